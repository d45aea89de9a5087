from . import errors as errors
from . import evaluate as evaluate
from . import report as report
from . import tl as tl
from ._progress import Progress as Progress
from .model.loading import LoadedModel as LoadedModel
from .model.loading import load as load
from .train.finetune import finetune as finetune
from .train.finetune_config import FinetuneConfig as FinetuneConfig
from .train.pretrain import pretrain as pretrain

__version__: str
