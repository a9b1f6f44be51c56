"""Makes `grpo_advantages.json`: what TRL's own lines make of the rewards of several functions. Run where TRL 1.16.0 is installed.

    python -m tests.golden.make_advantages

The lines stand in the middle of a method that writes answers, so they are cut out of TRL's file and run as they are.
"""

import ast
import json
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch

GOLDEN = Path(__file__).with_name("grpo_advantages.json")


def source_of(module: str) -> ast.Module:
    """The syntax of a module of TRL, which is not imported."""
    package = find_spec("trl")
    assert package is not None and package.origin is not None
    return ast.parse(Path(package.origin).parent.joinpath(*module.split(".")).with_suffix(".py").read_text())


def main() -> None:
    """Write the rewards, the weights and TRL's advantages, for both ways to combine."""
    names: dict = {"torch": torch}
    for node in ast.walk(source_of("trainer.utils")):
        if isinstance(node, ast.FunctionDef) and node.name == "nanstd":
            exec(compile(ast.Module([node], []), "trl", "exec"), names)
    (lines,) = [
        node
        for node in ast.walk(source_of("trainer.grpo_trainer"))
        if isinstance(node, ast.If)
        and "multi_objective_aggregation ==" in ast.unparse(node.test)
        and "sum_then_normalize" in ast.unparse(node.test)
    ]
    generator = torch.Generator().manual_seed(3)
    cases = []
    for aggregation in ("sum_then_normalize", "normalize_then_sum"):
        for has_unscored in (False, True):
            rewards = torch.rand(5, 4, 3, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 20.0, 0.1])
            rewards[1, :, 0] = 0.5  # alike in a group
            rewards[2, :, :] = 0.25  # a group without spread
            if has_unscored:
                rewards[3, 1, 0] = torch.nan  # one reward does not apply
                rewards[4, 2, :] = torch.nan  # none does
            flat = rewards.reshape(-1, 3)
            names |= {
                "self": SimpleNamespace(
                    multi_objective_aggregation=aggregation,
                    scale_rewards="group",
                    reward_weights=torch.tensor([1.0, 0.5, -2.0], dtype=torch.float64),
                    reward_funcs=[None] * 3,
                ),
                "rewards_per_func": flat,
                "unscorable_mask": torch.isnan(flat).all(dim=1),
                "num_generations": 4,
                "device": torch.device("cpu"),
            }
            exec(compile(ast.Module([lines], []), "trl", "exec"), names)
            made = torch.nan_to_num(names["advantages"], nan=0.0).view(5, 4)
            shown = [[[None if value != value else value for value in row] for row in g] for g in rewards.tolist()]
            cases.append({"aggregation": aggregation, "rewards": shown, "advantages": made.tolist()})
    content = {"trl": version("trl"), "torch": torch.__version__, "weights": [1.0, 0.5, -2.0], "cases": cases}
    GOLDEN.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
