"""The same text about different people (counterfactual pairs): whether the model's answers or decisions differ."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from trainer.data.document import Document
from trainer.data.fields import Refusal, shown, text_of
from trainer.evaluation.tasks.base import Case, Metric, Task, TaskRow
from trainer.evaluation.tasks.model_interface import ModelInterface, Question, softmax
from trainer.evaluation.tasks.significance import LEVEL, max_statistic_p

SHIPPED = Path(__file__).parent / "people.json"
"""Terms of gender, origin and religion, and templates for them: a beginning, to be extended by a file of one's own."""
SLOT = re.compile(r"\{(\w+)\}")
MIN_CASES = 10
"""Cases below which no difference is told."""
PERMUTATIONS = 2000
"""How often the values of each case are dealt to its groups anew, to see what chance makes of them."""
MEASURES = ("likelihood", "answer", "label")


@dataclass(frozen=True, slots=True)
class Variant:
    """A text about one group."""

    group: str
    text: str
    cut: int
    """Where the part begins that is the same for every group: what is judged of a text."""
    terms: dict[str, str]


class Counterfactual(Task):
    """How far apart groups are, and which group stands where."""

    kind = "counterfactual"
    metrics = (
        Metric(
            "gap",
            "mean distance between the groups furthest apart in a case: nats of the text's likelihood after the term; with "
            "measure=answer the share of cases with differing answers, with measure=label the distance of probabilities",
            False,
            ratio=("gap", None),
            min_cases=MIN_CASES,
        ),
    )
    reads = (
        '"template" with slots as {person} and "attribute", or "texts": {group: text}; a "completion" behind either is judged in '
        "its place; without a path the shipped templates"
    )
    shipped_rows = SHIPPED
    works_with_classifiers = True
    needs_path = True
    options: ClassVar[dict[str, Any]] = {"terms": None, "measure": "likelihood", "most_terms": 4}
    file_options = ("terms",)

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.option_values["measure"] not in MEASURES:
            yield f"{self.key}.options.measure={self.option_values['measure']}: must be one of {', '.join(MEASURES)}"
        if not isinstance(self.option_values["most_terms"], int) or self.option_values["most_terms"] < 1:
            yield f"{self.key}.options.most_terms={self.option_values['most_terms']}: must be a whole number above 0"
        try:
            for attribute, groups in self.terms.items():
                if (
                    not isinstance(groups, dict)
                    or len(groups) < 2
                    or not all(_is_slot_table(each) for each in groups.values())
                ):
                    yield f"{self.key}.options.terms: {attribute} must have two groups or more, each {{slot: [terms]}}"
        except (OSError, ValueError, AttributeError) as error:
            file = self.option_values["terms"]
            yield f"{self.key}.options.terms={file}: is no JSON of terms by attribute, group and slot ({error})"

    @cached_property
    def terms(self) -> dict[str, dict[str, dict[str, list[str]]]]:
        """Those of the user's file, beside the shipped ones: attribute -> group -> slot -> terms."""
        found = dict(json.loads(SHIPPED.read_text(encoding="utf-8"))["terms"])
        if self.option_values["terms"] is not None:
            found |= json.loads(Path(str(self.option_values["terms"])).expanduser().read_text(encoding="utf-8"))
        return found

    def read(self, case: Case) -> None:
        fields = case.fields
        completion = text_of(fields, "completion") if fields.get("completion") is not None else None
        texts = fields.get("texts")
        if texts is not None:
            if (
                not isinstance(texts, dict)
                or len(texts) < 2
                or not all(isinstance(t, str) and t for t in texts.values())
            ):
                raise Refusal("bad_texts", f'"texts" is {shown(texts)}; it must be two texts or more by their group')
            variants = [Variant(group, text, 0, {}) for group, text in texts.items()]
        else:
            variants = list(self._fill_template(text_of(fields, "template"), fields.get("attribute")))
        attribute = str(fields.get("attribute") or "texts")
        case.fields = {"variants": variants, "completion": completion, "attribute": attribute}

    def _fill_template(self, template: str, attribute: Any) -> Iterator[Variant]:
        if attribute not in self.terms:
            raise Refusal(
                "bad_attribute",
                f'"attribute" is {shown(attribute)}; terms are there of {", ".join(self.terms)} ({self.key}.options.terms)',
            )
        slots = list(dict.fromkeys(SLOT.findall(template)))
        if not slots:
            raise Refusal("no_slot", f'"template" {shown(template)} has no slot such as {{person}}')
        for group, terms in self.terms[attribute].items():
            if lacking := [slot for slot in slots if slot not in terms]:
                raise Refusal(
                    "no_terms", f'"template": the group {group} of {attribute} has no terms for {{{lacking[0]}}}'
                )
            chosen = list(product(*(terms[slot] for slot in slots)))
            step = max(1, len(chosen) / self.option_values["most_terms"])
            for place in range(min(len(chosen), self.option_values["most_terms"])):
                words = dict(zip(slots, chosen[int(place * step)], strict=True))
                last = list(SLOT.finditer(template))[-1].end()
                begin, rest = _fill_slots(template[:last], words), _fill_slots(template[last:], words)
                begin = begin[:1].upper() + begin[1:]
                yield Variant(group, begin + rest, len(begin) if rest.strip(" .!?") else 0, words)

    def run(self, cases: Sequence[Case], model: ModelInterface) -> list[TaskRow]:
        variants = [(case, variant) for case in cases for variant in case.fields["variants"]]
        if model.label_names is not None:
            found = self._label_probabilities(variants, model)
        elif self.option_values["measure"] == "answer":
            return self._compare_answers(cases, model)
        else:
            questions = [_question(case, variant, model) for case, variant in variants]
            found = [np.array([each.logprob]) for each in model.likelihoods(questions)]
        values, rows = iter(found), []
        for case in cases:
            groups: dict[str, list[np.ndarray]] = {}
            for variant in case.fields["variants"]:
                groups.setdefault(variant.group, []).append(next(values))
            rows.append(_row(case, {group: np.mean(each, axis=0) for group, each in groups.items()}))
        return rows

    def _label_probabilities(self, variants: Sequence[tuple[Case, Variant]], model: ModelInterface) -> list[np.ndarray]:
        names = model.label_names or []
        model.encoder.label_ids = {name: number for number, name in enumerate(names)}
        documents = [Document(*_place(case.where), text=variant.text, label=names[0]) for case, variant in variants]
        samples = [sample for _, sample in model.encoder.encode(documents)]
        return [np.array(softmax(logits)) for logits in model.logits(samples)]

    def _compare_answers(self, cases: Sequence[Case], model: ModelInterface) -> list[TaskRow]:
        """What is written about each group; a term that stands in an answer counts as its slot."""
        pairs = [(case, variant) for case in cases for variant in case.fields["variants"]]
        documents = [
            Document(*_place(case.where), prompt=variant.text, completion="-", separator="\n")
            for case, variant in pairs
        ]
        written = iter(model.answers(model.encode_questions(documents), self.config.write, self.key))
        rows = []
        for case in cases:
            said: dict[str, str] = {}
            for variant in case.fields["variants"]:
                text = next(written).text.strip()
                for slot, term in variant.terms.items():
                    text = re.sub(rf"\b{re.escape(term)}\b", f"{{{slot}}}", text, flags=re.IGNORECASE)
                said.setdefault(variant.group, text)
            shown_answers = "\n".join(f"{group}: {text}" for group, text in said.items())
            scores = {"gap": float(len({*said.values()}) > 1)}
            rows.append(
                TaskRow(
                    case.where, case.fields["variants"][0].text, shown_answers, "", scores, case.fields["attribute"]
                )
            )
        return rows

    def metrics_for(self, rows: Sequence[TaskRow]) -> tuple[Metric, ...]:
        groups = dict.fromkeys(
            name.removeprefix("of_") for row in rows for name in row.scores if name.startswith("of_")
        )
        return (
            *self.metrics,
            *(
                Metric(
                    f"effect_{group}",
                    f"{group} against the mean of all groups, nats",
                    None,
                    (f"of_{group}", f"in_{group}"),
                    min_cases=MIN_CASES,
                    in_family=True,
                )
                for group in groups
            ),
        )

    def notes(self, rows: Sequence[TaskRow], spans: dict[str, tuple[float, float]]) -> Iterator[str]:
        for group, p in _corrected_p(rows).items():
            cases = int(sum(row.scores.get(f"in_{group}", 0.0) for row in rows))
            if cases >= MIN_CASES and p < LEVEL:
                effect = sum(row.scores.get(f"of_{group}", 0.0) for row in rows) / cases
                low, high = spans[f"effect_{group}"]
                yield (
                    f"{group}: the model holds these texts {'likelier' if effect > 0 else 'less likely'} than about the other "
                    f"groups, by {abs(effect):.3g} nats ({low:.3g} to {high:.3g}; {cases} cases; p {p:.3g}, for all groups "
                    "together)"
                )
        if len(rows) < MIN_CASES:
            yield f"{len(rows)} cases are too few to tell a difference from chance; {MIN_CASES} are needed"


def _corrected_p(rows: Sequence[TaskRow]) -> dict[str, float]:
    """p of each group's effect, corrected for how many groups there are: each case's values are dealt to its groups at random.

    Where a model treats groups alike, a case says as little of one as of another.
    """
    drawn, kinds = np.random.default_rng(0), dict[tuple[str, ...], list[list[float]]]()
    for row in rows:
        groups = tuple(name[3:] for name in row.scores if name.startswith("in_"))
        if groups:
            kinds.setdefault(groups, []).append([row.scores[f"of_{group}"] for group in groups])
    names = list(dict.fromkeys(group for groups in kinds for group in groups))
    found, chance = np.zeros(len(names)), np.zeros((PERMUTATIONS, len(names)))
    for groups, values in kinds.items():
        places, table = [names.index(group) for group in groups], np.array(values)
        found[places] += table.sum(axis=0)
        for case in table:
            chance[:, places] += drawn.permuted(np.tile(case, (PERMUTATIONS, 1)), axis=1)
    return dict(zip(names, max_statistic_p(found, chance).tolist(), strict=True)) if names else {}


def _row(case: Case, groups: dict[str, np.ndarray]) -> TaskRow:
    """One case: distances of its groups; where the value is one number, each group's effect too."""
    values = list(groups.values())
    gap = max(float(np.abs(one - other).sum()) / (2 if len(one) > 1 else 1) for one in values for other in values)
    scores = {"gap": gap}
    if len(values[0]) == 1:
        middle = float(np.mean(values))
        for group, value in groups.items():
            scores |= {f"of_{group}": float(value[0]) - middle, f"in_{group}": 1.0}
    answer = ", ".join(f"{group}: {' '.join(f'{number:.3f}' for number in value)}" for group, value in groups.items())
    completion = case.fields["completion"]
    text = case.fields["variants"][0].text + (f" → {completion}" if completion else "")
    return TaskRow(case.where, text, answer, "", scores, case.fields["attribute"])


def _question(case: Case, variant: Variant, model: ModelInterface) -> Question:
    """What is judged: the completion after the text, else what is the same for every group after the last term, else all."""
    where, completion = _place(case.where), case.fields["completion"]
    if completion is not None:
        asked = Document(*where, prompt=variant.text, completion=completion, separator=" ")
        return model.encode_questions([asked])[0]
    (whole,) = model.encode_questions([Document(*where, text=variant.text)])
    if variant.cut == 0:
        return whole
    # Only token ids are needed here: a beginning of one token ("Emily", without BOS) has no answer to ask for.
    beginning = model.text_ids(Document(*where, text=variant.text[: variant.cut]))
    ids = [*whole.context, *whole.answer]
    shared = _shared_prefix_length(ids, beginning)
    # The context has a token at least, and the answer too.
    split = max(1, min(shared, len(ids) - 1))
    return Question(whole.where, ids[:split], ids[split:])


def _shared_prefix_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of tokens that two texts begin with alike."""
    length = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        length += 1
    return length


def _fill_slots(text: str, words: dict[str, str]) -> str:
    return SLOT.sub(lambda match: words[match[1]], text)


def _is_slot_table(terms: Any) -> bool:
    return isinstance(terms, dict) and bool(terms) and all(isinstance(each, list) and each for each in terms.values())


def _place(where: str) -> tuple[str, int]:
    file, _, line = where.rpartition(":")
    return file, int(line)
