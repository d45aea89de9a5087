"""Files in and out: inputs opened with errors for people, outputs checked first and written whole or not at all."""
