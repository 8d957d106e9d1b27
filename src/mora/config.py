"""The configuration of a MoRA adapter."""

from __future__ import annotations

from dataclasses import dataclass, field

import peft
from peft.config import PeftConfig
from peft.utils import PeftType

from .operators import Grouping, get_operator

PEFT_TYPE = "MORA"


def add_peft_type(name: str = PEFT_TYPE) -> None:
    """Add a member to PEFT's enum of methods, which has no hook for methods from outside.

    Raises ImportError where PEFT has a member of that name: two methods can't share the name that adapters are saved
    under, and taking it over would break adapters of PEFT's.
    """
    if name in PeftType.__members__:
        if not hasattr(PeftType[name], "added_by_mora"):
            raise ImportError(
                f"This version of PEFT ({peft.__version__}) has a method {name} of its own, which this project's "
                f"would collide with. Use PEFT's, or an earlier version of PEFT: pip install 'peft<{peft.__version__}'."
            )
        return
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.added_by_mora = True  # type: ignore[attr-defined]
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)


add_peft_type()


@dataclass
class MoraConfig(PeftConfig):
    """Configuration of a [`MoraModel`] (arXiv 2405.12130).

    MoRA has no alpha and no scaling: the update is decompress(M compress(x)), with M zero at the start.

    Raises ValueError: r below 1, an unknown operator or grouping, a dropout outside [0, 1).
    """

    r: int = field(
        default=8,
        metadata={
            "help": (
                "The rank of the LoRA with the same number of trainable parameters. A layer of d x k gets one square "
                "matrix M of round(sqrt((d + k) * r)) rows."
            )
        },
    )
    operator: str = field(
        default="rotation",
        metadata={
            "help": (
                "How x is compressed to M's size and M's output decompressed: 'rotation' (Eq. 9; the paper's choice at "
                "small r), 'sharing' (Eq. 6; its choice at large r), 'decoupling' (Eq. 8), 'truncation' (Eq. 4), or "
                "one of your own (`mora.register_operator`)."
            )
        },
    )
    in_grouping: Grouping = field(
        default="strided",
        metadata={
            "help": (
                "Sharing only: which inputs are summed. 'strided': those of equal index modulo M's size; 'blocked': "
                "contiguous ones."
            )
        },
    )
    out_grouping: Grouping = field(
        default="strided", metadata={"help": "Sharing only: which outputs share a value; as `in_grouping`."}
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": (
                "Names of the modules to adapt, a regular expression over whole names, or 'all-linear' (all linear "
                "layers but the output layer). Linear and transformers' Conv1D can be adapted."
            )
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of modules to leave out, or a regular expression over whole names."}
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout probability on the adapter's input."})
    use_dora: bool = field(
        default=False,
        metadata={
            "help": (
                "Train the lengths of the weight's rows (one for each output) apart from their directions, as DoRA "
                "does (arXiv 2402.09353): W' = m (W + delta) / |W + delta|, where m starts as |W|."
            )
        },
    )
    fan_in_fan_out: bool = field(
        default=False,
        metadata={"help": "True where the layer stores its weight as (in, out), as GPT-2's Conv1D does."},
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={
            "help": (
                "Modules apart from the adapted layers that are trained and saved, such as a classifier that starts "
                "from random weights."
            )
        },
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "True: M starts at zero, so that the model starts unchanged. False: small random values."},
    )
    layers_to_transform: list[int] | int | None = field(
        default=None,
        metadata={"help": "Indices of the layers to adapt; only where `target_modules` is a list."},
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={"help": "Name of the list of layers that `layers_to_transform` counts, where PEFT doesn't know it."},
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={"help": "Other values of r, by module name or regular expression."},
    )
    cap: bool = field(
        default=False,
        metadata={
            "help": (
                "What to do with a layer too small for r, where M would be larger than min(d, k): False is an error; "
                "True takes the largest M that fits, with a warning."
            )
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[PEFT_TYPE]
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # PEFT's convention
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("`layers_to_transform` cannot be used when `target_modules` is a str.")
        if isinstance(self.target_modules, str) and self.layers_pattern is not None:
            raise ValueError("`layers_pattern` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and not self.layers_to_transform:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")
        for name, r in {"r": self.r, **self.rank_pattern}.items():
            if not isinstance(r, int) or isinstance(r, bool) or r < 1:
                raise ValueError(f"`{name}` should be a positive rank, got {r!r}.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"`dropout` should be at least 0 and below 1, got {self.dropout}.")
        for side in ("in_grouping", "out_grouping"):
            if getattr(self, side) not in ("strided", "blocked"):
                raise ValueError(f"`{side}` should be 'strided' or 'blocked', got {getattr(self, side)!r}.")
        get_operator(self.operator)
