"""The network of a run, with the convolutions that are fastest on its devices."""

from jax.sharding import Mesh

from hsee_jax.config.schema import Config
from hsee_jax.data import PARTITIONS, DatasetInfo, Views, views_of
from hsee_jax.nn.model import Model
from hsee_jax.nn.registry import NETWORKS
from hsee_jax.runs.data import build_info
from hsee_jax.runs.forms import convolution_of


def views_in(config: Config, info: DatasetInfo) -> Views:
    """Return what the clients of a run see of its samples.

    Args:
      config: of the run.
      info: on its data.

    Raises:
      UserError: the view does not fit the samples or the clients.
    """
    deal = PARTITIONS.make(config.data.partition, options=config.data.options)
    return views_of(deal, info.input_shape, config.clients.num_clients)


def build_model(
    config: Config,
    info: DatasetInfo | None = None,
    mesh: Mesh | None = None,
    *,
    plain: bool = False,
) -> Model:
    """Build the network that a configuration describes.

    Args:
      config: of the run.
      info: on its data; None looks it up.
      mesh: the devices whose fastest form of the convolution is taken; None for the
        default device.
      plain: with the convolution itself, whatever form of it is fastest: for costs, and
        for programs that run elsewhere.
    """
    info = info or build_info(config.data)
    return NETWORKS.make(
        config.model.network,
        options={
            **config.model.options,
            **convolution_of(config, mesh, plain=plain),
        },
        num_classes=info.num_classes,
        input_shape=views_in(config, info).shape,
    )
