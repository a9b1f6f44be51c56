"""Rules for data that only the words beside it give away: record, policy, account and licence numbers, user names."""

# ruff: noqa: RUF001

from __future__ import annotations

import re

from trainer.data.stages.privacy import checksums
from trainer.data.stages.privacy.rule import Rule

CODE = r"(?=[\w./-]*\d)[A-Za-z0-9](?:[\w./-]{1,28}[A-Za-z0-9])(?![\w-])"
"""A number of an office: a digit in it, three characters or more."""
SPACED = r"(?=[\w ./-]*\d)[A-Za-z0-9]{1,12}(?:[ ./-]?(?=[\w.-]*\d)[A-Za-z0-9]{2,12}){0,4}(?![\w-])"
"""The same, perhaps written in groups, each with a digit."""
IS = (
    r"(?:[\"')\]]*[ \t]*(?:[:#=]|n[o°º]\.?:?|num(?:ber|éro)?\b:?|nr\.?:?|id\b:?|code\b:?|is\b:?|was\b:?|"
    r"\([A-Z]{2,5}\)){0,3}[ \t]*[\"']?){1,2}"
)
"""What may stand between the word and the number."""


def _after(type_: str, names: str, value: str = CODE, score: float = 0.85, *hints: str) -> Rule:
    return Rule(type_, re.compile(rf"(?i)(?<!\w)(?:{names}){IS}({value})"), score, hints=hints, needs="digit")


RULES: tuple[Rule, ...] = (
    _after(
        "MEDICAL_RECORD",
        r"mrn|mr ?#|med(?:ical)? rec(?:ord)?s?|patient(?:[ -]?id(?:entifier)?| number| no\.?| #)|"
        r"chart (?:number|no\.?|#|id)"
        r"|hospital (?:number|no\.?)|encounter (?:number|id|no\.?|#)|patientennummer|numéro de dossier|"
        r"accession (?:number|no\.?|#)",
        CODE,
        0.9,
        *("mrn", "mr#", "mr #", "record", "rec", "patient", "chart", "hospital", "encounter", "dossier", "accession"),
    ),
    _after(
        "HEALTH_PLAN",
        r"(?:health )?(?:plan|insurance|medicare|medicaid)(?: member)? (?:id|number|no\.?|#)|(?:member|"
        r"subscriber|beneficiary)[ -]?(?:id|number|no\.?|#)"
        r"|policy (?:number|no\.?|id|#)|group (?:number|no\.?|#)|versicherten ?(?:nummer|nr\.?)|"
        r"krankenkasse(?:nnummer)?",
        CODE,
        0.85,
        *(
            "plan",
            "insurance",
            "medica",
            "member",
            "subscriber",
            "beneficiary",
            "policy",
            "group n",
            "group #",
            "versicherten",
            "krankenkasse",
        ),
    ),
    _after(
        "ACCOUNT",
        r"(?:bank |checking |savings |customer |client )?(?:account|acct)\.?(?: (?:number|no\.?|id|#)|#|"
        r"[ \t]*:|(?= [*\d]))|a/c(?: no\.?)?|routing (?:number|no\.?|#)"
        r"|sort code|customer (?:id|number|no\.?|#)|konto(?:nummer|-?nr\.?)|kunden(?:nummer|-?nr\.?)|"
        r"numéro de (?:compte|client)|bank ?leitzahl|blz",
        SPACED,
        0.8,
        *(
            "account",
            "acct",
            "a/c",
            "routing",
            "sort code",
            "customer",
            "konto",
            "kunden",
            "compte",
            "de client",
            "leitzahl",
            "blz",
        ),
    ),
    _after(
        "LICENSE",
        r"driv(?:er'?s?|er’s|ing)[ -]?licen[cs]e|dl(?= ?(?:#|no|number|:))|licen[cs]e (?:number|no\.?|id|#)|"
        r"passport|certificate (?:number|no\.?|#)"
        r"|dea(?= ?(?:#|no|number|:))|führerschein(?:nummer)?|(?:reise)?pass(?:nummer|-?nr\.?)|"
        r"personalausweis(?:nummer)?|permis de conduire|passeport",
        CODE,
        0.8,
        *("licen", "dl", "passport", "certificate", "dea", "führerschein", "pass", "ausweis", "permis"),
    ),
    Rule(
        "LICENSE",
        re.compile(r"(?i)(?<!\w)npi" + IS + r"(\d{10})(?!\d)"),
        0.95,
        check=checksums.npi,
        hints=("npi",),
        needs="digit",
    ),
    _after("VEHICLE", r"vin|vehicle identification", r"[A-HJ-NPR-Z0-9]{11,17}(?!\w)", 0.85, "vin", "vehicle"),
    _after(
        "VEHICLE",
        r"(?:licen[cs]e|number|registration) plate|(?:vehicle )?registration(?= (?:number|no|mark))|"
        r"plate(?= (?:number|no|#)|[#:])|kennzeichen|immatriculation|reg\.? no\.?",
        r"(?=[\w -]*\d)[A-ZÄÖÜ0-9]{1,4}(?:[ -]?[A-Z0-9]{1,4}){1,2}(?!\w)",
        0.8,
        *("plate", "registration", "kennzeichen", "immatriculation", "reg"),
    ),
    _after(
        "DEVICE",
        r"(?:device |implant )?serial(?: (?:number|no\.?|#)|#|:)|s/n|sn:|device (?:id|identifier|number|"
        r"no\.?)|(?:pacemaker|implant) (?:id|number|no\.?|#)|imei|meid|udi|seriennummer",
        CODE,
        0.8,
        *("serial", "s/n", "sn:", "device", "pacemaker", "implant", "imei", "meid", "udi", "serien"),
    ),
    Rule(
        "USERNAME",
        re.compile(
            r"(?i)(?<!\w)(?:user ?(?:name|id)|login(?: name)?|screen ?name|handle|nickname|benutzername|"
            r"identifiant|skype|telegram|instagram|twitter|discord)"
            r"[\"']?(?: is| was|:| :| =|=){1,2} ?[\"'“]?(@?[a-z][\w.#-]{1,30}\w)(?![\w@(])"
        ),
        0.75,
        hints=(
            "user",
            "login",
            "screen",
            "handle",
            "nickname",
            "benutzer",
            "identifiant",
            "skype",
            "telegram",
            "instagram",
            "twitter",
            "discord",
        ),
    ),
    Rule(
        "USERNAME",
        re.compile(
            r"(?<![\w@./`])@(?!(?:property|dataclass|staticmethod|classmethod|override|param|return|returns|"
            r"throws|pytest|media|import|"
            r"abstractmethod|cached_property|app|test|charset|see|since|author|deprecated|types?|interface|"
            r"everyone|here|channel)\b)"
            r"([A-Za-z_]\w{2,29}(?:\.\w{1,20}){0,2})(?![\w@(/])"
        ),
        0.6,
        against=re.compile(r"(?:^|\n)[ \t*]*@$"),
        needs="at",
    ),
)
