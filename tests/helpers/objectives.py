"""One row an objective: small settings of each variant, and where its loss is proven; test_complete.py asks for the row."""

from dataclasses import dataclass

from trainer.objectives.base import ObjectiveConfig, TeacherConfig
from trainer.objectives.classification import ClassificationConfig
from trainer.objectives.distillation import DistillationConfig
from trainer.objectives.grpo_config import (
    Baseline,
    ClipForm,
    GrpoConfig,
    ImportanceLevel,
    KlConfig,
    KlPlace,
    Normalise,
    Scale,
)
from trainer.objectives.kto import KtoConfig
from trainer.objectives.preference import DpoConfig, OrpoConfig, PairLoss, SimpoConfig
from trainer.objectives.pretrain import PretrainConfig
from trainer.objectives.reward import RewardConfig
from trainer.objectives.seq2seq import Seq2seqConfig
from trainer.objectives.sft import SftConfig


@dataclass(frozen=True, slots=True)
class ObjectiveTests:
    """Where the tests of one objective stand."""

    variants: dict[str, ObjectiveConfig]
    """Small settings by a short name: the objective itself, then one for each value of a setting that changes the loss."""
    oracle: str
    """Test file that compares the loss with numbers of another library, or with arithmetic by hand."""
    parity: str
    """Module of tests/parity that takes the same steps under every strategy."""


OBJECTIVE_TESTS: dict[str, ObjectiveTests] = {
    "sft": ObjectiveTests({"sft": SftConfig()}, "tests/losses/test_next_token.py", "matrix.py"),
    "pretrain": ObjectiveTests({"pretrain": PretrainConfig()}, "tests/objectives/test_pretrain.py", "matrix.py"),
    "classification": ObjectiveTests(
        {"classification": ClassificationConfig(), "several labels": ClassificationConfig(multi_label=True)},
        "tests/objectives/test_classification.py",
        "features.py",
    ),
    "dpo": ObjectiveTests(
        {
            "dpo": DpoConfig(beta=0.5),
            "ipo": DpoConfig(loss_type=PairLoss.ipo, sft_weight=0.2),
            "hinge": DpoConfig(loss_type=PairLoss.hinge),
        },
        "tests/objectives/test_preference.py",
        "pairs.py",
    ),
    "orpo": ObjectiveTests({"orpo": OrpoConfig()}, "tests/objectives/test_preference.py", "pairs.py"),
    "simpo": ObjectiveTests(
        {"simpo": SimpoConfig(label_smoothing=0.1)}, "tests/objectives/test_preference.py", "pairs.py"
    ),
    "reward": ObjectiveTests({"reward": RewardConfig(centre=0.01)}, "tests/objectives/test_preference.py", "pairs.py"),
    "seq2seq": ObjectiveTests({"seq2seq": Seq2seqConfig()}, "tests/objectives/test_seq2seq.py", "two_sides.py"),
    "kto": ObjectiveTests({"kto": KtoConfig(beta=0.5)}, "tests/objectives/test_kto.py", "teachers.py"),
    "distillation": ObjectiveTests(
        {"distillation": DistillationConfig(teacher=TeacherConfig(path="teacher"))},
        "tests/objectives/test_distillation.py",
        "teachers.py",
    ),
    "grpo": ObjectiveTests(
        {
            "grpo": GrpoConfig(group_size=4),
            "grpo by answer": GrpoConfig(group_size=4, importance_level=ImportanceLevel.sequence),
            "grpo unbounded": GrpoConfig(group_size=4, clip_form=ClipForm.none),
            "grpo near its start": GrpoConfig(group_size=4, kl=KlConfig(weight=0.1)),
            "grpo of the round": GrpoConfig(
                group_size=4,
                baseline=Baseline.batch,
                scale=Scale.batch_std,
                normalise=Normalise.answer,
                kl=KlConfig(weight=0.1, place=KlPlace.reward),
            ),
        },
        "tests/objectives/test_policy.py",
        "rounds.py",
    ),
}


def variants_of(*names: str) -> dict[str, ObjectiveConfig]:
    """Small settings of all variants of some objectives, by the variant's name."""
    variants: dict[str, ObjectiveConfig] = {}
    for name in names:
        variants |= OBJECTIVE_TESTS[name].variants
    return variants
