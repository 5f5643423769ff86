"""Clients on devices of their own, and trained clients for use without this package."""

from hsee_jax.deployment.box import Box
from hsee_jax.deployment.bundle import Ask, Courier, take_turn
from hsee_jax.deployment.device import Device, join
from hsee_jax.deployment.export import export_client, export_device
from hsee_jax.deployment.fleet import Engine, Fleet, Reply
from hsee_jax.deployment.protocol import Refusal
from hsee_jax.deployment.reception import serve
from hsee_jax.deployment.roster import Roster
from hsee_jax.deployment.service import Service
from hsee_jax.deployment.settings import NodeSettings, ServerSettings
from hsee_jax.deployment.take_part import take_part
from hsee_jax.deployment.types import Patience

__all__ = [
    "Ask",
    "Box",
    "Courier",
    "Device",
    "Engine",
    "Fleet",
    "NodeSettings",
    "Patience",
    "Refusal",
    "Reply",
    "Roster",
    "ServerSettings",
    "Service",
    "export_client",
    "export_device",
    "join",
    "serve",
    "take_part",
    "take_turn",
]
