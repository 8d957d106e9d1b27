"""MoRA (arXiv 2405.12130) as a PEFT tuner. Importing this package registers it in PEFT.

from peft import get_peft_model
from mora import MoraConfig

model = get_peft_model(model, MoraConfig(r=8, target_modules="all-linear"))
"""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method

from .config import PEFT_TYPE, MoraConfig
from .layer import Linear, MoraLayer
from .model import MoraModel
from .operators import Layout, Operator, get_operator, register_operator

__all__ = [
    "Layout",
    "Linear",
    "MoraConfig",
    "MoraLayer",
    "MoraModel",
    "Operator",
    "get_operator",
    "register_operator",
]

if PeftType[PEFT_TYPE] not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name=PEFT_TYPE.lower(), config_cls=MoraConfig, model_cls=MoraModel)
