"""A labelled set of made-up texts with personal data, drawn from a seed: at least 40 of each type, and hard negatives.

Values are valid (check digits hold) but belong to nobody on purpose: reserved domains, documentation networks, and
telephone numbers from the ranges kept for fiction where a country has them. Half of the persons' names are in no list
of the finder. Every item is (text, [(start, end, type), ...]).
"""

# ruff: noqa: SIM905

import itertools
import random
import string
from collections.abc import Callable

from trainer.data.transforms.privacy import context, patterns
from trainer.data.transforms.privacy.rule import TYPES

Item = tuple[str, list[tuple[int, int, str]]]
FIRST = "Jane Thomas Priya Carlos Emily Stefan Fatima Walter Oluwaseun Xiulan Thandiwe Björn Ngozi Tamsin Aurelio Saoirse".split()
LAST = "Okafor Whitcombe Müller García Szabó O'Neill Delacroix Nakamura Abernathy Kowalczyk Oduya Lindqvist Haddad Quist".split()
STREETS = "Larkspur Maple Ridgecrest Harbour Elm Kingsway Orchard Juniper".split()
TOWNS = "Bedford Springfield Boise Luton Fairview Oakdale".split()
DOMAINS = "example.com example.org mail.example.net clinic.example".split()


def digits(rng: random.Random, shape: str) -> str:
    """`#` becomes a digit, `@` a capital letter."""
    return "".join(
        rng.choice(string.digits) if c == "#" else rng.choice("ABCDEFGHJKLMNPRSTUVWXYZ") if c == "@" else c
        for c in shape
    )


def valid(check: Callable[[str], bool], *shapes: str) -> Callable[[random.Random], str]:
    """Draws until the check digits hold."""

    def draw(rng: random.Random) -> str:
        while True:
            value = digits(rng, rng.choice(shapes))
            if check(value):
                return value

    return draw


def iban(rng: random.Random) -> str:
    country, length = rng.choice((("DE", 22), ("FR", 27), ("NL", 18), ("GB", 22)))
    rest = {"NL": "ABNA", "GB": "WEST"}.get(country, "")
    rest += "".join(rng.choice(string.digits) for _ in range(length - 4 - len(rest)))
    value = next(v for k in range(2, 99) if patterns.is_iban(v := f"{country}{k:02d}{rest}"))
    return " ".join(value[i : i + 4] for i in range(0, length, 4)) if rng.random() < 0.5 else value


def fiscal_code(rng: random.Random) -> str:
    head = digits(rng, "@@@@@@##") + rng.choice("ABCDEHLMPRST") + f"{rng.randint(1, 28):02d}" + digits(rng, "@###")
    return next(v for c in string.ascii_uppercase if patterns.stdnum_check("it.codicefiscale")(v := head + c))


def nir(rng: random.Random) -> str:
    head = f"{rng.choice('12')}{rng.randint(0, 99):02d}{rng.randint(1, 12):02d}{rng.randint(1, 95):02d}" + digits(
        rng, "######"
    )
    value = head + f"{97 - int(head) % 97:02d}"
    cuts = (0, 1, 3, 5, 7, 10, 13, 15)
    return " ".join(value[a:b] for a, b in itertools.pairwise(cuts)) if rng.random() < 0.5 else value


def nif(rng: random.Random) -> str:
    shape = digits(rng, rng.choice(("########", "X#######", "Y#######")))
    return next(v for c in string.ascii_uppercase if patterns.is_spanish_nif(v := shape + c))


def vin(rng: random.Random) -> str:
    head, tail = digits(rng, "1@@@@##@"), digits(rng, "@@######")
    return next(v for c in "0123456789X" if context.is_vin(v := head + c + tail))


def name(rng: random.Random) -> str:
    middle = f"{rng.choice('ABCDEFGHJ')}. " if rng.random() < 0.15 else ""
    return f"{rng.choice(FIRST)} {middle}{rng.choice(LAST)}"


def email(rng: random.Random) -> str:
    first, last = rng.choice(FIRST).lower(), rng.choice(LAST).lower().replace("'", "")
    return f"{first}{rng.choice(('.', '_', '-', ''))}{last}{rng.choice(('', '+news', '42'))}@{rng.choice(DOMAINS)}"


def phone(rng: random.Random) -> str:
    area = rng.choice(("212", "415", "503", "617"))
    line = f"555-01{rng.randint(0, 99):02d}"
    return rng.choice(
        (
            f"({area}) {line}",
            f"{area}-{line}",
            f"+1 {area} {line}",
            f"{area}.{line.replace('-', '.')}",
            f"+44 20 7946 0{rng.randint(100, 999)}",
            f"020 7946 0{rng.randint(100, 999)}",
            f"07700 900{rng.randint(100, 999)}",
            f"+49 30 23125 {rng.randint(100, 999)}",
            f"+33 1 99 00 {rng.randint(10, 99)} {rng.randint(10, 99)}",
            f"01 99 00 {rng.randint(10, 99)} {rng.randint(10, 99)}",
        )
    )


def address(rng: random.Random) -> str:
    number, street, town = rng.randint(1, 1900), rng.choice(STREETS), rng.choice(TOWNS)
    house = number % 200 + 1
    kind = rng.choice(("Street", "Avenue", "Road", "Lane", "Drive", "Blvd", "St"))
    return rng.choice(
        (
            f"{number} {street} {kind}, {town}, {rng.choice(('IL', 'ID', 'OR', 'CA'))} {rng.randint(10000, 99899)}",
            f"{number} {street} {kind}, Apt {rng.randint(1, 40)}B",
            f"{number} {street} {kind}",
            f"{number} {street} Road, {town} {rng.choice(('MK41 7QT', 'LU1 2SE', 'SW1A 1AA'))}",
            f"{rng.choice(('Lindenallee', 'Hauptstraße', 'Goethestr.', 'Mühlenweg'))} {house}, {rng.randint(10115, 99998)} Köln",
            f"{house} rue {rng.choice(('de la Paix', 'des Tanneurs', 'Victor Hugo'))}, {rng.randint(10000, 95000)} Tours",
            f"P.O. Box {number}",
        )
    )


def date(rng: random.Random) -> str:
    year, month, day = rng.randint(1931, 2024), rng.randint(1, 12), rng.randint(1, 28)
    word = "January February March April May June July August September October November December".split()[month - 1]
    return rng.choice(
        (
            f"{year}-{month:02d}-{day:02d}",
            f"{month:02d}/{day:02d}/{year}",
            f"{day:02d}.{month:02d}.{year}",
            f"{word} {day}, {year}",
            f"{day} {word} {year}",
            f"{word[:3]} {day}, {year}",
            f"{month}/{day}/{year % 100:02d}",
        )
    )


def ip(rng: random.Random) -> str:
    if rng.random() < 0.3:
        return f"2001:db8:{rng.randint(1, 0xFFFF):x}::{rng.randint(0, 0xFFFF):x}:{rng.randint(16, 0xFFFF):x}"
    return f"{rng.choice(('192.0.2', '198.51.100', '203.0.113', '10.20.30'))}.{rng.randint(1, 254)}"


def secret(rng: random.Random) -> str:
    def take(count: int, alphabet: str = string.ascii_letters + string.digits) -> str:
        return "".join(rng.choice(alphabet) for _ in range(count))

    return rng.choice(
        (
            "AKIA" + take(16, string.ascii_uppercase + "234567"),
            "ghp_" + take(36),
            "xoxb-" + take(12, string.digits) + "-" + take(24),
            "sk-" + take(40),
            "hf_" + take(34, string.ascii_letters),
            f"eyJhbGciOiJIUzI1NiJ9.eyJ{take(30)}.{take(40)}",
        )
    )


def mac(rng: random.Random) -> str:
    pairs = [f"{rng.randint(0, 255):02x}" for _ in range(6)]
    return rng.choice((":", "-")).join(pairs)


VALUES: dict[str, Callable[[random.Random], str]] = {
    "SECRET": secret,
    "US_SSN": valid(patterns.stdnum_check("us.ssn"), "###-##-####"),
    "US_ITIN": valid(patterns.is_itin, "9##-##-####"),
    "UK_NHS": valid(patterns.stdnum_check("gb.nhs"), "### ### ####", "##########"),
    "UK_NINO": lambda rng: digits(rng, rng.choice(("AB ## ## ## C", "JG######A", "SE ## ## ## D"))),
    "DE_TAX_ID": valid(patterns.stdnum_check("de.idnr"), "###########", "## ### ### ###"),
    "FR_NIR": nir,
    "ES_NIF": nif,
    "IT_FISCAL_CODE": fiscal_code,
    "NL_BSN": valid(patterns.stdnum_check("nl.bsn"), "#########"),
    "PL_PESEL": valid(patterns.stdnum_check("pl.pesel"), "###########"),
    "IN_AADHAAR": valid(patterns.stdnum_check("in_.aadhaar"), "3### #### ####", "7### #### ####"),
    "BR_CPF": valid(patterns.stdnum_check("br.cpf"), "###.###.###-##"),
    "CREDIT_CARD": valid(patterns.is_card, "4### #### #### ####", "51##############", "37## ###### #####"),
    "IBAN": iban,
    "MEDICAL_RECORD": lambda rng: digits(rng, rng.choice(("########", "C-######", "@@#####"))),
    "HEALTH_PLAN": lambda rng: digits(rng, rng.choice(("@@@#########", "HX-#######-0#", "########"))),
    "ACCOUNT": lambda rng: digits(rng, rng.choice(("########", "####-####-##", "CU-######"))),
    "LICENSE": lambda rng: digits(rng, rng.choice(("@#######", "#########", "@####-#####"))),
    "VEHICLE": vin,
    "DEVICE": lambda rng: digits(rng, rng.choice(("PJN-#######", "SN########", "@@##-######"))),
    "FAX": phone,
    "PHONE": phone,
    "EMAIL": email,
    "URL": lambda rng: (
        f"https://{rng.choice(DOMAINS)}/{rng.choice(LAST).lower().replace(chr(39), '')}?id={rng.randint(1, 999)}"
    ),
    "IP": ip,
    "MAC": mac,
    "DATE_OF_BIRTH": date,
    "AGE": lambda rng: str(rng.randint(90, 104)),
    "DATE": date,
    "ADDRESS": address,
    "POSTCODE": lambda rng: rng.choice(("MK41 7QT", "LU1 2SE", "SW1A 1AA", "B33 8TH", "EC1A 1BB")),
    "USERNAME": lambda rng: f"{rng.choice(('kestrel', 'mira', 'tundra'))}_{rng.randint(10, 99)}",
    "PERSON": name,
}
NEAR: dict[str, tuple[str, ...]] = {
    "SECRET": ("The key {} was pushed by mistake.", "token={}", "Authorization uses {} for now."),
    "US_SSN": ("SSN: {}", "Her social security number is {}.", "The form lists {} in box 3."),
    "US_ITIN": ("ITIN {}", "Filed under taxpayer id {}.", "He files with {} each year."),
    "UK_NHS": ("NHS number {}", "NHS no: {}"),
    "UK_NINO": ("National insurance number {}.", "Her NI number is {}.", "{} is on the payslip."),
    "DE_TAX_ID": ("Steuer-ID {}", "Die Steueridentifikationsnummer lautet {}.", "IdNr. {} eintragen"),
    "FR_NIR": ("Numéro de sécurité sociale {}", "NIR {}", "L'assuré {} est à jour."),
    "ES_NIF": ("DNI {}", "con NIF {} y domicilio conocido", "El titular, {}, firma aquí."),
    "IT_FISCAL_CODE": ("codice fiscale {}", "C.F. {}", "intestato a {}"),
    "NL_BSN": ("BSN {}", "burgerservicenummer: {}"),
    "PL_PESEL": ("PESEL {}", "numer {} w dokumencie"),
    "IN_AADHAAR": ("Aadhaar {}", "UIDAI letter for {}", "The card shows {}."),
    "BR_CPF": ("CPF {}", "inscrito sob {}"),
    "CREDIT_CARD": ("card {}", "Paid with {} yesterday.", "Please charge {}."),
    "IBAN": ("IBAN {}", "Transfer it to {} today.", "Konto {}"),
    "MEDICAL_RECORD": ("MRN: {}", "Medical record number {} was merged.", "patient id {}", "Chart # {}"),
    "HEALTH_PLAN": ("Member ID: {}", "policy number {}", "Health plan number is {}."),
    "ACCOUNT": ("Account number {}", "acct no. {}", "customer ID {} called"),
    "LICENSE": ("Driver's license {}", "passport no. {}", "license number: {}"),
    "VEHICLE": ("VIN {}", "The van {} was towed.", "chassis {}"),
    "DEVICE": ("Serial number {}", "pacemaker serial no. {}", "device ID: {}"),
    "FAX": ("Fax: {}", "Please fax it to {}.", "fax no. {}"),
    "PHONE": ("Phone: {}", "You can call me on {} after six.", "{} is the best number.", "mobile {}"),
    "EMAIL": ("Write to {}.", "E-mail: {}", "<{}> bounced"),
    "URL": ("See {} for the photo.", "profile: {}"),
    "IP": ("Login from {} failed.", "client {} timed out", "blocked {}"),
    "MAC": ("MAC {}", "adapter {} is down"),
    "DATE_OF_BIRTH": ("DOB: {}", "Date of birth {}", "She was born on {}."),
    "AGE": ("A {}-year-old woman.", "He is {} years old.", "age {}"),
    "DATE": ("Seen on {}.", "Admitted {} with fever.", "The visit of {} was cancelled."),
    "ADDRESS": ("I live at {}.", "Ship to: {}", "He moved to {} last year."),
    "POSTCODE": ("postcode {}", "The shop near {} is closed."),
    "USERNAME": ("username: {}", "Follow @{} for news", "login: {}", "his handle is {}"),
    "PERSON": (
        "Dear {},", "Patient: {}", "My name is {}.", "Dr. {} will see you.", "Best regards,\n{}", "{} has not paid yet.",
        "We met {} at the station.", "Name: {}",
    ),
}  # fmt: skip
NEGATIVES = (
    "Order 4155550{n3} was shipped.",
    "Invoice no. 20{n2}-00{n4} is paid.",
    "version 10.0.{n4}.{n3}",
    "Release v2.{n2}.{n3} is out.",
    "ISBN 978-3-16-148410-0",
    "It costs {n3},{n3}.99 dollars.",
    "The meeting is at 14:{n2}.",
    "See 47.{n4}, 8.{n4} on the map.",
    "def f(x): return x[{n2}:{n3}] + 0x{n4}",
    "Tracking number {n4}{n4}{n4}",
    "commit {n3}af9c{n2}",
    "The score was 3-2 after 90 minutes.",
    "Mix {n3} g flour with 2 eggs.",
    "About {n4}{n3} people live there.",
    "item 12-34567 is sold out",
    "She is {n2} percent sure.",
    "std::vector<int> v; a::b c;",
    "@property\ndef size(self): ...",
    "ticket {n4}-{n4}",
    "GDP grew 2.{n2} percent in 20{n2}.",
    "Part 10.{n2}.1 of the manual",
    "pi is 3.14159265358979",
    "The New York Times reported it.",
    "Main Street was crowded.",
    "Chapter 12, pages 101-1{n2}",
    "Room 4{n2}, third floor",
    "{n3}.{n3}.{n3} rows were read",
    "uuid 123e4567-e89b-12d3-a456-426614174000",
    "Dear customer,",
    "Best regards,\nThe Team",
    "Patient: Yes, it hurts.",
    "Doctor: How are you?",
    "tel aviv is warm",
    "Sample {n4}/{n4}",
    "He ran 10 km in 45:{n2}.",
    "Load average: 0.{n2}, 1.{n2}, 2.{n2}",
    "SKU {n4}-{n3}-{n4}",
    "A 45-year-old man",
    "aged 12",
    "page 1/{n3}",
)


def negative(rng: random.Random) -> str:
    text = rng.choice(NEGATIVES)
    for mark, low, high in (("{n2}", 10, 59), ("{n3}", 100, 999), ("{n4}", 1000, 9999)):
        while mark in text:
            text = text.replace(mark, str(rng.randint(low, high)), 1)
    return text


def synthetic(seed: int = 1, per_type: int = 40, num_negatives: int = 400) -> list[Item]:
    """`per_type` items of each type, half with a hard negative beside them, and `num_negatives` without any data."""
    rng = random.Random(seed)
    items: list[Item] = []
    for type_ in TYPES:
        if type_ not in VALUES:
            continue
        for place in range(per_type):
            value = VALUES[type_](rng)
            before, after = NEAR[type_][place % len(NEAR[type_])].split("{}")
            lead = negative(rng) + "\n" if place % 2 else ""
            start = len(lead) + len(before)
            items.append((lead + before + value + after, [(start, start + len(value), type_)]))
    items += [(negative(rng), []) for _ in range(num_negatives)]
    return items
