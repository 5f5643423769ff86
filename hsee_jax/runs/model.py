"""The network of a run, with its fastest convolutions, and the codec of its links."""

from jax.sharding import Mesh

from hsee_jax.config.schema import ClientsConfig, Config
from hsee_jax.core.errors import UserError
from hsee_jax.core.registry import is_ours
from hsee_jax.data import PARTITIONS, DatasetInfo, Views, views_of
from hsee_jax.link.codecs import CODECS, Codec
from hsee_jax.nn.gates import with_gates
from hsee_jax.nn.model import Model, check_model
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
      plain: take the native convolution, whatever form is fastest: for costs, and for
        programs that run elsewhere.

    Raises:
      UserError: the network does not take the samples, its parts do not fit together,
        or it cannot have the gates that a target for the width needs.
    """
    info = info or build_info(config.data)
    model = NETWORKS.make(
        config.model.network,
        options={
            **config.model.options,
            **convolution_of(config, mesh, plain=plain),
        },
        num_classes=info.num_classes,
        input_shape=views_in(config, info).shape,
    )
    if not is_ours(NETWORKS.entry(config.model.network).make):  # tests check ours
        check_model(model, info.num_classes)
    target = config.strategy.options.get("width_target")
    return model if target is None else _with_gates(model, config, target)


def build_codec(clients: ClientsConfig) -> Codec:
    """Build the codec of the links from clients to servers.

    Raises:
      UserError: there are more speeds of links than clients.
    """
    rates = clients.options.get("link_rates", ())
    if len(rates) > clients.num_clients:
        raise UserError(
            f"link_rates: {len(rates)} speeds are not allowed for "
            f"{clients.num_clients} clients; allowed are as many or fewer"
        )
    return CODECS.make(clients.link, options=clients.options)


def _with_gates(model: Model, config: Config, target: float) -> Model:
    """Give the layers gates; refuse weights from a file, which holds no gates.

    Raises:
      UserError: the network has no gates, or starts from a file.
    """
    if config.model.pretrained is not None:
        raise UserError(
            f"pretrained: {config.model.pretrained} is not allowed with width_target, "
            "whose gates no file holds; allowed is a network that starts anew"
        )
    if not model.gated_stages:
        raise UserError(
            f"width_target: {target} is not allowed with network "
            f"{config.model.network} and these options, which has no channel gates; "
            "allowed are networks with gates, such as resnet18 with --norm batch"
        )
    return with_gates(model)
