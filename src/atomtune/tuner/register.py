"""Making the method known to PEFT, which has no plugin point for methods from outside."""

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

NAME = "ATOMS"
PREFIX = "atom_"


def _add_member(name: str) -> PeftType:
    """The member of PeftType of that name; added at run time, since a plain string dies on `.value`."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    type.__setattr__(PeftType, name, member)
    return member


ATOMS = _add_member(NAME)


def register(config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Register the method with PEFT; a second call does nothing."""
    if ATOMS not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=NAME.lower(), config_cls=config_cls, model_cls=model_cls, prefix=PREFIX)
