"""Jobs of several processes, forked: they start in no time and see what the test has made."""

import multiprocessing
import os
import pickle
import socket
import traceback


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_job(world, work, tmp_path, timeout=30.0):
    """What ``work(ranks)`` returns in each of ``world`` processes; their first error, if there is one."""
    port = free_port()
    context = multiprocessing.get_context("fork")
    files = [tmp_path / f"result-{rank}.pickle" for rank in range(world)]

    def one(rank):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        from scmulan._dist import training_ranks

        try:
            with training_ranks(timeout) as ranks:
                result = work(ranks)
        except BaseException as error:  # noqa: BLE001 (all of it is the test's business)
            result = error
            traceback.print_exc()
        files[rank].write_bytes(pickle.dumps(result))
        os._exit(0)

    children = [context.Process(target=one, args=(rank,)) for rank in range(world)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    results = [pickle.loads(file.read_bytes()) if file.exists() else None for file in files]
    for file in files:
        file.unlink(missing_ok=True)
    return results
