"""Names of persons without a language model: titles, labels, greetings, signatures, and common first names.

This finds names where writers mark them. It misses most of the others; `engine=presidio` finds more of these.
"""

# ruff: noqa: RUF001, SIM905

from __future__ import annotations

import re

from trainer.data.stages.privacy.rule import Finding, Rule

UP = "A-ZÀ-ÖØ-ÞĀĂĄĆČĎĐĘĚĞĢĪİĶĻŁŃŅŇŐŒŘŚŞŠŤŪŮŰŹŻŽ"
WORD = rf"[{UP}][^\W\d_]+(?:['’](?!s\b|S\b)[^\W\d_]+|-[{UP}][^\W\d_]+)*|[OD]['’][{UP}][^\W\d_]+"
PARTICLE = r"(?:(?:(?:van|von|de|der|den|del|della|di|da|dos|la|le|bin|al|el|zu|zur|ter|ten)[ ]){1,3})?"
REST = rf"(?:[ \t]{PARTICLE}(?:{WORD})|[ \t][{UP}]\.(?=[ \t][{UP}]))"
ONE = rf"(?:(?:{WORD})|[{UP}]\.(?=[ \t][{UP}])){REST}{{0,3}}"
TWO = rf"(?:(?:{WORD})|[{UP}]\.(?=[ \t][{UP}])){REST}{{1,3}}"
TITLE = (
    r"(?:Dr|Mr|Mrs|Ms|Mx|Prof|Hr|Mme|Mlle|Sr|Sra|Rev|Drs|Dott|Fr|Ing|Sgt|Lt|Capt)\.?|Miss|Doctor|"
    r"Professor|Herrn?|Frau|Monsieur|Madame|"
    r"[Ss]eñora?|Signora?|Sir|Grandma|Grandpa|Uncle|Aunt|Auntie|Dame|Nurse|Judge|Sister|Pastor|Reverend"
)
NOT_NAMES = frozenset(
    "the this that these those my your our his her their its i we you he she it they a an and or but if "
    "so no yes ok okay hello hi hey dear "
    "sir madam sirs team all everyone everybody there customer client colleague colleagues friend "
    "friends members member staff manager hiring "
    "committee editor applicant parent parents student students user users doctor nurse patient mr mrs "
    "ms dr prof sirs sehr herren damen "
    "monday tuesday wednesday thursday friday saturday sunday january february march april may june july "
    "august september october november "
    "december today tomorrow yesterday president speaker chairman chair minister please thank thanks "
    "what when where who why how which well "
    "oh um uh yeah sure not none unknown confidential private anonymous redacted pending n/a tbd new "
    "york street avenue road god lord world "
    "good great fine here service support sales department office company inc ltd gmbh university "
    "college hospital clinic bank church king "
    "queen court house center centre city county state united states kingdom from to in on at of for "
    "with is are was were be been has have "
    "had do does did can could will would shall should must might also just very then than now only "
    "after before since until during".split()
)
"""Words that are written large at the place of a name and are none."""
FIRST_NAMES = frozenset(
    "Aaron Abigail Adam Adrian Ahmed Alan Albert Alejandro Alexander Alexandra Ali Alice Alison Allison "
    "Amanda Amelia Amy Ana Andrea Andreas Andrew "
    "Angela Anita Anna Anne Annette Anthony Antonio Ashley Barbara Beatrice Benjamin Bernard Beth Betty "
    "Brandon Brenda Brian Bruce Camille Carl "
    "Carla Carlos Carmen Carol Caroline Carolyn Catherine Cecilia Charles Cheryl Chloe Christian "
    "Christina Christine Christopher Claire Clara "
    "Claudia Craig Cynthia Daniel Daniela David Deborah Debra Denise Dennis Diana Diane Diego Dmitri "
    "Dominik Donald Donna Dorothy Douglas Edward "
    "Elena Elizabeth Ellen Emily Emma Eric Erik Ethan Eugene Eva Evelyn Fatima Felix Fernando Florian "
    "Frances Francesca Francesco Francisco Frank "
    "Franz Frederick Gabriel Gary George Gerald Giovanni Giulia Gloria Gregory Guillaume Hannah Hans "
    "Harold Heather Heidi Helen Henry Ian Ingrid "
    "Isabel Isabella Ivan Jack Jacob Jacqueline James Jan Jane Janet Janice Jason Javier Jean Jeffrey "
    "Jennifer Jeremy Jessica Joan Johann Johannes John Jonathan "
    "Jorge Jose José Joseph Joshua Joyce Juan Judith Judy Julia Julian Julie Jürgen Justin Karen Karin "
    "Karl Katharina Katherine Kathleen Keith "
    "Kelly Kenneth Kevin Kimberly Klaus Krzysztof Kumar Larry Laura Lauren Lawrence Leonard Linda Lisa "
    "Louis Louise Lucas Lucia Luis Lukas Magdalena Manuel "
    "Marco Margaret Maria María Marie Marilyn Mario Marta Martha Martin Mary Matteo Matthew Maximilian "
    "Megan Melissa Michael Michelle Miguel "
    "Mohamed Mohammed Monica Monika Muhammad Nancy Natalia Natalie Nathan Nicholas Nicolas Nicole Nikhil "
    "Noah Olga Oliver Olivia Omar Oscar Pablo Pamela "
    "Patricia Patrick Paul Paula Pedro Peter Philip Philippe Pierre Priya Rachel Rafael Rajesh Ralph "
    "Raymond Rebecca Renate Ricardo Richard Robert Roberto "
    "Roger Ronald Rosa Ruth Ryan Sabine Samantha Samuel Sandra Sanjay Sara Sarah Scott Sebastian Sergio "
    "Sharon Shirley Simon Sofia Sophia Sophie "
    "Stefan Stephanie Stephen Steven Sunita Susan Susanne Teresa Theresa Thomas Timothy Tobias Tomasz "
    "Tyler Ursula Valentina Vincent Virginie "
    "Walter Wanda Wei Wendy William Wolfgang Yolanda Yuki Yusuf Zachary Zoe".split()
)
"""First names that are common where the languages of the other rules are spoken, and are no everyday words."""
LABELS = (
    r"(?:full |first |last |sur|family |given |patient |customer |client |contact |employee |maiden |"
    r"account holder |emergency contact )?name"
    r"|patient|contact(?: person)?|attn|attention|employee|customer|client|applicant|(?:attending |"
    r"referring |primary care )?(?:physician|provider|doctor|surgeon)"
    r"|guardian|mother|father|spouse|next of kin|emergency contact|signed(?: by)?|author|sender|recipient|"
    r"from|to|cc|nom|prénom|nombre|vorname|nachname"
    r"|kunde|patientin|ansprechpartner|nome|naam|reporter|requested by|prepared by|dictated by|"
    r"interviewer|account holder|witness"
)


def is_name(text: str) -> bool:
    """Whether no word of a capitalised phrase is one that never is part of a name."""
    return not any(word.casefold() in NOT_NAMES for word in text.split())


def begins_with_first_name(text: str) -> bool:
    """Whether a capitalised phrase starts with a common first name; `Anne-Marie` counts by its first part."""
    return text.split()[0].split("-")[0] in FIRST_NAMES and is_name(text)


def _name(regex: str, score: float, *hints: str) -> Rule:
    return Rule("PERSON", re.compile(regex), score, check=is_name, hints=hints)


RULES: tuple[Rule, ...] = (
    _name(rf"(?<!\w)(?:(?:{TITLE})[ \t]+){{1,3}}({ONE})", 0.85),
    _name(rf"(?m)(?:^|[;,|.\t])[ \t*_-]*(?i:{LABELS})[*_]*[ \t]*[:=][ \t]*[*_]*[\"']?({TWO})", 0.8, ":", "="),
    _name(
        rf"(?<!\w)(?i:(?:full |first |last |sur|family |given |patient |vor|nach)name|name|nom|"
        rf"nombre)[\"'*_]*[ \t]*[:=][ \t]*[\"'*_]*({ONE})",
        0.75,
        ":",
        "=",
    ),
    _name(
        rf"(?<!\w)(?i:my (?:full |first |last )?name(?:'s|’s| is)|je m['’]appelle|ich heiße|mein name ist|"
        rf"me llamo|mi chiamo|i['’]?m called|call me|(?:he|she|person|patient|man|woman|colleague|wife|husband|"
        rf"son|daughter|sister|brother) (?:is |was )?(?:named|called))[ \t]+({ONE})",
        0.85,
        *("name", "appelle", "heiße", "llamo", "chiamo", "call"),
    ),
    _name(
        rf"(?<!\w)(?i:i am|i['’]m|this is|ich bin|je suis|soy)[ \t]+({TWO})(?=[,.!?\n]|[ \t](?i:and|from|with|"
        rf"at|calling|the|a|your)\b|$)",
        0.65,
    ),
    _name(
        rf"(?m)(?<!\w)(?:Dear|Hi|Hello|Hey|Liebe[rs]?|Hallo|Sehr geehrte[rs]?|Chère?|Bonjour|Estimad[oa]|Hola|"
        rf"Good (?:morning|afternoon|evening)),?[ \t]+(?:(?:{TITLE})[ \t]+)*({ONE})(?=[ \t]*(?:[,!:;.–-]|$))",
        0.8,
    ),
    _name(
        r"(?m)(?i:^[ \t]*(?:(?:best|kind|warm|many|with)[ \t]+(?:kind |best |warm )?(?:regards|wishes|thanks)|"
        r"regards|sincerely|respectfully|yours(?: (?:sincerely|truly|faithfully))?|best|cheers|thanks|"
        r"thank you|"
        rf"love|mit freundlichen grüßen|viele grüße|mfg|cordialement|bien à vous|saludos|un saludo|"
        rf"atentamente)[ \t]*[,.!]?[ \t]*)\n{{1,3}}[ \t]*[-–—]*[ \t]*(?:(?:{TITLE})[ \t]+)?({ONE})"
        rf"[ \t]*,?[ \t]*$",
        0.8,
        "\n",
    ),
    _name(rf"({TWO})\"?(?=[ \t]?<[^<>@\s]+@)", 0.9, "<"),
    _name(rf"(?<!\w)({TWO})(?=,?[ \t](?:M\.?D|Ph\.?D|R\.?N|D\.?O|Esq|PA-C|DDS|DVM|MBBS|FRCP)\b)", 0.8),
    _name(
        rf"(?<!\w)(?i:spoke (?:with|to)|signed by|seen by|referred by|prepared by|written by|reported by|"
        rf"assigned to|meet(?:ing)? with|contact|attn\.?|c/o)[ \t]+({TWO})",
        0.7,
        "by",
        "with",
        " to",
        "contact",
        "attn",
        "c/o",
    ),
    _name(
        r"(?<!\w)(?i:my|his|her|our|their|the) (?:late |old |little |elder |younger )?(?:son|daughter|wife|husband|"
        r"partner|mother|father|brother|sister|colleague|friend|boss|neighbou?r|landlord|tenant|cousin|nephew|niece),? "
        rf"({ONE})",
        0.65,
    ),
    _name(rf"(?<!\w)(?i:patient|client|tenant|landlord|witness|defendant|plaintiff|attention)[ \t]+({TWO})", 0.65),
    Rule("PERSON", re.compile(rf"(?<!\w)(?=({TWO})(?!\w))"), 0.65, check=begins_with_first_name),
)


def mentions(text: str, names: set[str]) -> list[Finding]:
    """Further places of names found elsewhere in the same document: the whole name, and its last word alone."""
    known = {name for name in names if len(name.split()) > 1}
    known |= {name.split()[-1] for name in known}
    known = {name for name in known if len(name) > 2 and is_name(name) and name in text}
    if not known:
        return []
    longest_first = "|".join(re.escape(name) for name in sorted(known, key=lambda name: (-len(name), name)))
    return [Finding("PERSON", *match.span(), 0.6) for match in re.finditer(rf"(?<!\w)(?:{longest_first})(?!\w)", text)]
