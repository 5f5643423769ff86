"""The flag ``--link-rates-from-devices`` of ``hsee train`` and ``hsee plan``."""

from typing import Any

from hsee_jax.cli.flags import Parser
from hsee_jax.config import Config, override
from hsee_jax.core.errors import UserError
from hsee_jax.link.codecs import CODECS
from hsee_jax.systems.device_file import read_devices


def add_link_rates(parser: Parser) -> None:
    """Add the flag that `config_with_link_rates` reads."""
    parser.add_argument(
        "--link-rates-from-devices",
        action="store_true",
        help="sets --link-rates to the speeds of the devices' uplinks; needs --devices "
        "and --link topk",
    )


def config_with_link_rates(config: Config, given: dict[str, Any]) -> Config:
    """Return a configuration with the uplinks of its devices, if the flag is given.

    Args:
      config: the run's configuration.
      given: flags by name.

    Raises:
      UserError: no file of devices is given, ``--link-rates`` is given as well, or the
        run's link reads no rates.
    """
    if "link_rates_from_devices" not in given:
        return config
    if "devices" not in given:
        raise UserError("devices: missing; link_rates_from_devices needs them")
    if "link_rates" in given:
        raise UserError(
            "link_rates: is not allowed together with link_rates_from_devices"
        )
    link, readers = config.clients.link, CODECS.readers("link_rates")
    if link not in readers:
        raise UserError(
            f"link_rates_from_devices: has no effect on link {link}; allowed is "
            f"{', '.join(readers)}"
        )
    fleet = read_devices(given["devices"], seed=config.run.partition_seed)
    rates = tuple(device.up_bytes_per_s for device in fleet.clients)
    return override(config, link_rates=rates)
