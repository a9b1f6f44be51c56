"""Counts of identity terms in the training data: how often groups are mentioned, beside which words, with which labels.

Counts alone: nothing is dropped or changed. The built-in lists are English, short, and meant to be replaced by lists
that fit the domain. `LIMITS` says what such counts can and cannot show, and goes into every report.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from strategies.errors import ConfigError
from trainer.data.document import Document

GROUPS: dict[str, str] = {
    "gender/female": "she, her, hers, herself, woman, women, girl, girls, female, females, lady, ladies",
    "gender/male": "he, him, his, himself, man, men, boy, boys, male, males, gentleman, gentlemen",
    "gender/transgender and non-binary": "transgender, trans woman, trans women, trans man, trans men, trans people, "
    "nonbinary, non-binary, genderqueer",
    "religion/christian": "christian, christians, christianity, catholic, catholics, protestant, protestants",
    "religion/muslim": "muslim, muslims, islam, islamic",
    "religion/jewish": "jew, jews, jewish, judaism",
    "religion/hindu": "hindu, hindus, hinduism",
    "religion/buddhist": "buddhist, buddhists, buddhism",
    "religion/sikh": "sikh, sikhs, sikhism",
    "religion/none": "atheist, atheists, atheism, agnostic, agnostics",
    "ethnicity/black": "black people, black person, black man, black men, black woman, black women, african american, "
    "african americans, black american, black americans",
    "ethnicity/white": "white people, white person, white man, white men, white woman, white women, caucasian, "
    "caucasians, white american, white americans",
    "ethnicity/asian": "asian, asians, asian american, asian americans, chinese, japanese, korean, koreans, vietnamese",
    "ethnicity/south asian": "south asian, south asians, indian, indians, pakistani, pakistanis, bangladeshi",
    "ethnicity/latino": "latino, latinos, latina, latinas, latinx, hispanic, hispanics, mexican, mexicans",
    "ethnicity/arab": "arab, arabs, middle eastern, iraqi, iraqis, syrian, syrians",
    "ethnicity/african": "african, africans, nigerian, nigerians, ethiopian, ethiopians, kenyan, kenyans",
    "ethnicity/indigenous": "indigenous people, indigenous peoples, native american, native americans, aboriginal",
    "ethnicity/roma": "roma people, romani, gypsy, gypsies",
    "ethnicity/turkish": "turkish, turk, turks",
    "ethnicity/eastern european": "eastern european, eastern europeans, russian, russians, ukrainian, "
    "ukrainians, romanian, romanians, bulgarian, bulgarians",
    "age/young": "young person, young people, teenager, teenagers, teen, teens, adolescent, adolescents, youth, youths",
    "age/old": "old person, old people, elderly, senior citizen, senior citizens, older adult, older adults, "
    "older people, pensioner, pensioners",
    "disability/disabled": "disabled, disability, disabilities, handicapped, wheelchair user, wheelchair users, deaf, "
    "blind person, blind people, autistic, autism, mentally ill, down syndrome",
    "disability/not disabled": "able bodied, abled, non disabled, nondisabled, neurotypical",
    "sexual orientation/homosexual": "gay, gays, lesbian, lesbians, homosexual, homosexuals, same sex couple, "
    "same sex couples",
    "sexual orientation/bisexual": "bisexual, bisexuals",
    "sexual orientation/heterosexual": "heterosexual, heterosexuals, straight man, straight men, straight woman, "
    "straight women, straight people, opposite sex couple, opposite sex couples",
}
"""Built-in identity terms, by family/group; ethnicity includes nationality. No such list is complete or neutral."""

ATTRIBUTES: dict[str, str] = {
    "competence": "competent, capable, skilled, skilful, skillful, intelligent, smart, clever, brilliant, talented, "
    "expert, experts, qualified, efficient, successful, genius",
    "warmth": "warmth, warm hearted, kindness, friendly, caring, gentle, compassionate, helpful, sincere, loving, "
    "generous, polite, nurturing",
    "violence": "violent, violence, attack, attacks, attacked, kill, kills, killed, killing, murder, murdered, "
    "terrorist, terrorists, terrorism, bomb, bombs, weapon, weapons, assault, assaulted",
    "crime": "crime, crimes, criminal, criminals, thief, thieves, steal, steals, stole, theft, robbery, robbed, gang, "
    "gangs, arrested, prison, jail, convicted, fraud, smuggling",
    "family": "family, families, home, house, household, housework, parent, parents, child, children, baby, babies, "
    "marriage, married, wedding, relatives, cousin, cousins",
    "career": "career, careers, job, jobs, office, business, salary, profession, professional, manager, management, "
    "executive, corporation, boss, employee, employees, engineer, engineers",
}
"""Built-in attribute words: warmth and competence after the stereotype content model (Fiske et al. 2002), family and
career as themes of the word-embedding association tests (Caliskan et al. 2017)."""

LIMITS = (
    "The counts are of words from lists, not of people: names, pronouns of unlisted forms, other languages and indirect "
    "mentions are missed, and words with several meanings are counted in all of them.",
    "An attribute near a group term is not a statement about the group: negation, quotation, criticism and fiction "
    "count alike.",
    "A log-odds ratio above 0 says that the attribute (or label) is commoner in documents that mention this group than "
    "in those that mention the other groups of the family. It does not say why, or that a model trained on them is unfair.",
    "The intervals take documents as independent; copies make them too narrow. About one in twenty of many intervals "
    "excludes 0 by chance.",
    "A group with few mentions has a wide interval: absence of evidence, not evidence of balance.",
)
"""What the counts can and cannot show, in plain words."""

_WORD = re.compile(r"\w+")
_COUNTERS = ("labels", "mentions", "mentioning", "term_mentions", "near", "near_documents", "labelled")
_Z95 = 1.959963984540054  # the 97.5 % quantile of the normal distribution
MOST_LABELS = 50
"""Labels compared in the report; rarer ones are left out and counted in `labels_left_out`."""


@dataclass(kw_only=True, slots=True)
class BiasConfig:
    """Counting of identity terms. It reports; it changes no data."""

    enabled: bool = False
    """Count identity terms, the attributes near them and their labels."""
    groups: dict[str, list[str]] = field(default_factory=dict)
    """Terms by "family/group", which replace the built-in lists; groups without a family are compared to each other."""
    attributes: dict[str, list[str]] = field(default_factory=dict)
    """Words by attribute, which replace the built-in lists of competence, warmth, violence, crime, family and career."""
    window: int = 10
    """Most words from a group term to an attribute word that still counts as near; texts and turns are not crossed."""


class BiasCounter:
    """Counts over documents. Blocks counted in different processes are added up with `merge`; it can be pickled.

    Terms match whole words whatever their case; hyphens and apostrophes part words, so that "African-American" matches
    "african american" and "woman's" matches "woman". Within a family of groups, and among the attributes, a word counts
    in one term alone, the longest that begins first: "trans woman" is no mention of "woman", while "black woman" counts
    for both gender and ethnicity. Raises ConfigError for terms that cannot match.
    """

    def __init__(self, config: BiasConfig) -> None:
        self.window = config.window
        groups = config.groups or {name: terms.split(", ") for name, terms in GROUPS.items()}
        attributes = config.attributes or {name: words.split(", ") for name, words in ATTRIBUTES.items()}
        problems = []
        if config.window < 1:
            problems.append(f"data.bias.window={config.window}: must be at least 1; 10 words as a rule")
        self._terms: dict[tuple[str, ...], str] = {}  # words of a term -> the term as it was written first
        self._groups_of: dict[str, list[str]] = {}
        self._attributes_of: dict[str, list[str]] = {}
        owners_of = {"groups": self._groups_of, "attributes": self._attributes_of}
        for what, lists in (("groups", groups), ("attributes", attributes)):
            for name, terms in lists.items():
                if not terms:
                    problems.append(f"data.bias.{what}.{name}: the list is empty; give it terms or remove it")
                for term in terms:
                    words = tuple(_WORD.findall(term.casefold()))
                    if not words:
                        problems.append(f"data.bias.{what}.{name}: {term!r} holds no word, so it can never match")
                        continue
                    owned = owners_of[what].setdefault(self._terms.setdefault(words, term), [])
                    if name not in owned:
                        owned.append(name)
        if problems:
            raise ConfigError(problems)
        self._families_of: dict[str, set[str | None]] = {term: {None} for term in self._attributes_of}
        for term, names in self._groups_of.items():
            self._families_of.setdefault(term, set()).update(family_of(name)[0] for name in names)
        self._longest: dict[str, list[tuple[str, ...]]] = {}  # first word -> terms that begin with it, longest first
        for words in sorted(self._terms, key=lambda words: (-len(words), words)):
            self._longest.setdefault(words[0], []).append(words)
        self.groups = list(groups)
        self.attributes = list(attributes)
        self.documents = 0
        self.words = 0
        self.labels: Counter[str] = Counter()
        self.mentions: Counter[str] = Counter()  # mentions by group
        self.mentioning: Counter[str] = Counter()  # documents by group that they mention
        self.term_mentions: Counter[tuple[str, str]] = Counter()  # mentions by (group, term)
        self.near: Counter[tuple[str, str]] = Counter()  # mentions by (group, attribute near them)
        self.near_documents: Counter[tuple[str, str]] = Counter()  # documents by (group, attribute near it)
        self.labelled: Counter[tuple[str, str]] = Counter()  # documents by (group, label)

    def add(self, document: Document) -> None:
        """Count one document. The label is its label, or `desirable` / `undesirable` of a rated answer."""
        seen: set[str] = set()
        pairs: set[tuple[str, str]] = set()
        for text in document.texts():
            words = _WORD.findall(text.casefold())
            self.words += len(words)
            if not self._longest.keys().isdisjoint(words):
                self._count_text(words, seen, pairs)
        self.documents += 1
        self.mentioning.update(seen)
        self.near_documents.update(pairs)
        label = document.label
        if label is None and document.desirable is not None:
            label = "desirable" if document.desirable else "undesirable"
        if label is not None:
            self.labels[label] += 1
            self.labelled.update((group, label) for group in seen)

    def _count_text(self, words: list[str], seen: set[str], pairs: set[tuple[str, str]]) -> None:
        mentions, attributes = self._find(words)
        begins = [first for first, _, _ in attributes]
        ends = [last for _, last, _ in attributes]
        for first, last, group in mentions:
            self.mentions[group] += 1
            seen.add(group)
            # Attributes do not overlap each other, so both of their ends are sorted.
            reach = slice(bisect_left(ends, first - self.window), bisect_right(begins, last + self.window))
            near = {name for begin, end, names in attributes[reach] if begin > last or end < first for name in names}
            found = [(group, name) for name in near]
            self.near.update(found)
            pairs.update(found)

    def _find(self, words: list[str]) -> tuple[list[tuple[int, int, str]], list[tuple[int, int, list[str]]]]:
        """Mentions as (first word, last word, group), and attribute terms as (first word, last word, attributes)."""
        mentions: list[tuple[int, int, str]] = []
        attributes: list[tuple[int, int, list[str]]] = []
        starts = self._longest
        free: dict[str | None, int] = {}  # by family, None for attributes: the first word that no term has taken
        for position in [number for number, word in enumerate(words) if word in starts]:
            for term_words in starts[words[position]]:
                after = position + len(term_words)
                if len(term_words) > 1 and tuple(words[position:after]) != term_words:
                    continue
                term = self._terms[term_words]
                open_families = {family for family in self._families_of[term] if free.get(family, 0) <= position}
                if not open_families:
                    continue
                free.update(dict.fromkeys(open_families, after))
                for group in self._groups_of.get(term, ()):
                    if family_of(group)[0] in open_families:
                        self.term_mentions[group, term] += 1
                        mentions.append((position, after - 1, group))
                if None in open_families:
                    attributes.append((position, after - 1, self._attributes_of[term]))
        return mentions, attributes

    def merge(self, other: BiasCounter) -> None:
        """Add the counts of another block, counted with the same settings."""
        if (self._terms, self._groups_of, self._attributes_of, self.window) != (
            other._terms, other._groups_of, other._attributes_of, other.window,
        ):  # fmt: skip
            raise ValueError("bias counts with different settings cannot be added")
        self.documents += other.documents
        self.words += other.words
        for name in _COUNTERS:
            getattr(self, name).update(getattr(other, name))

    def state(self) -> dict[str, Any]:
        """The counts as plain values for JSON; the settings are not among them."""
        counters = {name: [[key, number] for key, number in getattr(self, name).items()] for name in _COUNTERS}
        return {"documents": self.documents, "words": self.words, **counters}

    @classmethod
    def of_state(cls, config: BiasConfig, state: dict[str, Any]) -> BiasCounter:
        """The counter that `state` was taken from; `config` must be the one it was made with."""
        counter = cls(config)
        counter.documents, counter.words = state["documents"], state["words"]
        for name in _COUNTERS:  # JSON has lists where pairs are keys
            getattr(counter, name).update({key if isinstance(key, str) else tuple(key): n for key, n in state[name]})
        return counter

    def as_dict(self) -> dict[str, Any]:
        """Everything for a report, as plain values; rows without a document on either side are left out.

        `families` holds the counts and rates, `skew` the attributes and `labels` the labels, each group against the
        other groups of its family (see `log_odds_ratio`; counted in documents). A document that mentions two groups
        counts for both.
        """
        families: dict[str, dict[str, Any]] = {}
        for group in self.groups:
            family, name = family_of(group)
            families.setdefault(family, {})[name] = {
                "documents": self.mentioning[group],
                "mentions": self.mentions[group],
                "share_documents": self.mentioning[group] / self.documents if self.documents else 0.0,
                "per_1000_words": 1000 * self.mentions[group] / self.words if self.words else 0.0,
                "terms": {
                    term: self.term_mentions[group, term] for term in self._groups_of if self.term_mentions[group, term]
                },
                "near": {name: self.near[group, name] for name in self.attributes if self.near[group, name]},
            }
        compared = [label for label, _ in sorted(self.labels.items(), key=lambda item: (-item[1], item[0]))][
            :MOST_LABELS
        ]
        labelled: Counter[str] = Counter()
        for (group, _), number in self.labelled.items():
            labelled[group] += number
        return {
            "documents": self.documents,
            "words": self.words,
            "window": self.window,
            "families": families,
            "skew": self._compare("attribute", self.attributes, self.near_documents, self.mentioning),
            "labels": self._compare("label", compared, self.labelled, labelled),
            "labels_left_out": len(self.labels) - len(compared),
            "limits": list(LIMITS),
        }

    def _compare(
        self, what: str, values: list[str], counts: Mapping[tuple[str, str], int], totals: Mapping[str, int]
    ) -> list[dict[str, Any]]:
        """One row for each group and value: its share of the group's documents against that of the other groups."""
        rows = []
        for group in self.groups:
            family, name = family_of(group)
            others = [other for other in self.groups if other != group and family_of(other)[0] == family]
            of_group, of_others = totals.get(group, 0), sum(totals.get(other, 0) for other in others)
            for value in values if of_group and of_others else ():
                count = counts.get((group, value), 0)
                count_others = sum(counts.get((other, value), 0) for other in others)
                ratio, low, high = log_odds_ratio(count, of_group, count_others, of_others)
                share, share_others = count / of_group, count_others / of_others
                row = {"family": family, "group": name, what: value, "count": count, "documents": of_group}
                row |= {"share": share, "share_others": share_others, "difference": share - share_others}
                rows.append(row | {"log_odds": ratio, "low": low, "high": high})
        return rows


def family_of(group: str) -> tuple[str, str]:
    """Family and name of a group written "family/name"; the family is `groups` where none is given."""
    family, slash, name = group.partition("/")
    return (family, name) if slash else ("groups", group)


def log_odds_ratio(count: int, total: int, count_others: int, total_others: int) -> tuple[float, float, float]:
    """Natural logarithm of the odds ratio of two shares, and the ends of its 95 % interval.

    With a = count, b = total - count and c, d likewise of the others, 0.5 is added to each (Haldane 1956, Anscombe
    1956), the ratio is ln(a d / (b c)) and its standard error sqrt(1/a + 1/b + 1/c + 1/d) (Woolf 1955). It is the
    log-odds ratio of Monroe et al. 2008 (Fightin' Words) with a flat prior of 0.5 in place of their informative one.
    """
    a, b = count + 0.5, total - count + 0.5
    c, d = count_others + 0.5, total_others - count_others + 0.5
    ratio = math.log(a * d / (b * c))
    margin = _Z95 * math.sqrt(1 / a + 1 / b + 1 / c + 1 / d)
    return ratio, ratio - margin, ratio + margin
