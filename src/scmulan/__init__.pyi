from . import tl as tl
from .model.loading import LoadedModel as LoadedModel
from .model.loading import load as load
from .train.finetune import finetune as finetune
from .train.pretrain import pretrain as pretrain

__version__: str
