"""Energy of the hosts while they train, by codecarbon's offline tracker; an estimate if a host has no meter.

One process per host measures, and writes `energy/<begin>-<host>.json` in the run directory every minute and at its
end. The energy of a run is the sum over its hosts and starts, including those that were killed.
"""

from __future__ import annotations

import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategies.extras import install_command
from strategies.runtime import Runtime
from trainer.reporting.status import write_text_atomic

if TYPE_CHECKING:
    from trainer.reporting.config import LoggingConfig

ENERGY_DIR_NAME = "energy"
MEASURE_EVERY_S = 15
"""Seconds between two measurements of power."""
MEASUREMENTS_PER_WRITE = 4
"""Measurements between two writes."""
START_TIMEOUT_S = 30
"""Seconds for which the end of a short run waits for a tracker that is still starting."""


def energy_problems(config: LoggingConfig, *, uses_this_host: bool) -> Iterator[str]:
    """Say before a run starts why energy cannot be measured as `logging.energy` asks; no message if it can:

    - `logging.energy` is no code of a country.
    - codecarbon is not installed. It is only looked for if the run uses this host's Python packages (`uses_this_host`).
    """
    if config.energy is None:
        return
    if not re.fullmatch(r"[A-Z]{3}", config.energy):
        yield f"logging.energy={config.energy}: must be the three letters of a country (ISO 3166), as in logging.energy=DEU"
    elif uses_this_host and find_spec("codecarbon") is None:
        yield f"logging.energy={config.energy}: needs the package codecarbon ({install_command('energy')})"


@contextmanager
def measure_energy(
    country: str | None, run_dir: Path, runtime: Runtime, print_line: Callable[[str], None]
) -> Iterator[None]:
    """A context around training in which codecarbon measures the energy of this host. One rank of each host measures for it.

    Writes the totals to a file in `energy/` of the run directory. `country`: three letters (ISO 3166), whose electricity
    decides the emissions; None measures nothing. If measuring fails, `print_line` gets the reason, and the run trains on.
    """
    if country is None or runtime.local_rank != 0:
        yield
        return
    file = run_dir / ENERGY_DIR_NAME / f"{time.time_ns()}-{socket.gethostname()}.json"  # of this start on this host
    meter = _Meter(country, file, print_line)
    meter.start()
    try:
        yield
    finally:
        meter.stop()


def energy_of_run(run_dir: Path) -> dict[str, Any] | None:
    """The energy that a run took, summed over its hosts and all its starts, for its record; None if nobody measured.

    Such as {"kwh": 1.2, "kg_co2e": 0.4, "hours": 6.0, "country": "DEU", "by": "codecarbon 3.0", "hosts": 2}. `hours` are
    those of all hosts together; country and measuring library are those of the newest start.
    """
    measurements: list[dict[str, Any]] = []  # one for each start on each host, such as {"host": "n1", "kwh": 0.6, ...}
    for path in sorted((run_dir / ENERGY_DIR_NAME).glob("*.json")):
        try:
            measurements.append(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError):  # its host was killed while it wrote the file for the first time
            continue
    if not measurements:
        return None
    energy: dict[str, Any] = {}
    for name in ("kwh", "kg_co2e", "hours"):
        energy[name] = sum(float(measurement[name]) for measurement in measurements)
    newest = measurements[-1]  # the files are sorted by name, which begins with the time of the start
    hosts = {measurement["host"] for measurement in measurements}
    return {**energy, "country": newest["country"], "by": newest["by"], "hosts": len(hosts)}


class _Meter(threading.Thread):
    """A thread that loads and starts codecarbon's tracker beside training, since both take seconds, and then ends.

    The tracker measures in threads of its own until `stop`.
    """

    def __init__(self, country: str, path: Path, print_line: Callable[[str], None]) -> None:
        super().__init__(name="energy", daemon=True)
        self.country = country
        self.path = path
        self.print_line = print_line
        self.tracker: Any = None

    def run(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.tracker = self._create_codecarbon_tracker()
            self.tracker.start()
        except Exception as error:  # noqa: BLE001 - whatever a meter lacks, the run trains on
            self.tracker = None
            one_line = " ".join(str(error).split())
            self.print_line(f"energy is not measured on {socket.gethostname()}: {one_line}")

    def stop(self) -> None:
        """End the measurement: the tracker measures once more and writes its totals. Failures are printed, not raised.

        In a short run the tracker may still be starting: it is given `START_TIMEOUT_S`.
        """
        self.join(START_TIMEOUT_S)
        if self.is_alive():
            self.print_line(
                f"energy is not measured on {socket.gethostname()}: codecarbon did not begin in {START_TIMEOUT_S} s"
            )
        elif self.tracker is not None:
            try:
                self.tracker.stop()
            except Exception as error:  # noqa: BLE001
                one_line = " ".join(str(error).split())
                self.print_line(f"energy: the last look failed on {socket.gethostname()}: {one_line}")

    def _create_codecarbon_tracker(self) -> Any:
        """Make codecarbon's tracker, which measures this host in threads of its own, without its files and its log.

        It hands its totals to `write_totals` once in `MEASUREMENTS_PER_WRITE` measurements, so that a run that is killed
        loses about a minute.
        """
        from codecarbon import OfflineEmissionsTracker
        from codecarbon.output import BaseOutput

        class TotalsToFile(BaseOutput):  # type: ignore[misc]
            """codecarbon's interface of an output: it calls `live_out` now and then, and `out` at the end.

            Its own instance is `_`, since `self` is the meter.
            """

            def out(_, total: Any, delta: Any) -> None:
                self.write_totals(total)

            live_out = out

        logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
        return OfflineEmissionsTracker(
            country_iso_code=self.country,
            measure_power_secs=MEASURE_EVERY_S,
            api_call_interval=MEASUREMENTS_PER_WRITE,
            output_handlers=[TotalsToFile()],
            save_to_file=False,
            allow_multiple_runs=True,
            log_level="critical",
        )

    def write_totals(self, emissions: Any) -> None:
        """Write the energy that this host has taken since the measurement began, in place of what was written before.

        Called by codecarbon about every minute, and at the end. `emissions`: codecarbon's `EmissionsData`. The file has,
        for example, {"host": "n1", "kwh": 0.6, "of": "2 x A100, EPYC, memory", "by": "codecarbon 3.0", ...}.
        """
        measured_devices = [emissions.cpu_model, "memory"]
        if emissions.gpu_count:
            measured_devices.insert(0, f"{emissions.gpu_count} x {emissions.gpu_model}")
        measurement = {
            "host": socket.gethostname(),
            "kwh": emissions.energy_consumed,
            "gpu_kwh": emissions.gpu_energy,
            "cpu_kwh": emissions.cpu_energy,
            "memory_kwh": emissions.ram_energy,
            "kg_co2e": emissions.emissions,
            "hours": emissions.duration / 3600,
            "country": emissions.country_iso_code,
            "of": ", ".join(device for device in measured_devices if device),
            "by": f"codecarbon {emissions.codecarbon_version}",
        }
        write_text_atomic(self.path, json.dumps(measurement, indent=1) + "\n")
