"""Hetero-SplitEE in slow plain Python: loops over clients, no vmap, no jit, no optax.

Written from the description of the method, to be compared with. It shares with the
package only what is not the method: the layers of the network, their first weights,
and the draw of each round (who takes part, which samples, in which order).
"""

import jax
import jax.numpy as jnp
import numpy as np


class Layer:
    """Weights, batch statistics and momentum of one layer or head of one holder."""

    def __init__(self, stage, variables):
        self.stage = stage
        self.params = variables["params"]
        self.stats = variables["batch_stats"]
        self.momentum = jax.tree.map(jnp.zeros_like, self.params)

    def sgd(self, grads, stats, rate, momentum, weight_decay):
        """Heavy-ball SGD; only matrices and convolutions decay."""

        def direction(p, g, m):
            decay = weight_decay if p.ndim > 1 else 0.0
            return momentum * m + g + decay * p

        self.momentum = jax.tree.map(direction, self.params, grads, self.momentum)
        self.params = jax.tree.map(
            lambda p, m: p - rate * m, self.params, self.momentum
        )
        self.stats = stats


def log_loss(logits, labels):
    """The mean cross-entropy."""
    log_p = logits - jax.scipy.special.logsumexp(logits, axis=1, keepdims=True)
    return sum(-log_p[row, label] for row, label in enumerate(labels)) / len(labels)


def train_branch(layers, head, x, labels, rate, momentum, weight_decay):
    """One step on the mean cross-entropy; returns features and the sum of losses."""
    parts = [*layers, head]

    def loss(params):
        h, stats, features = x, [], None
        for i, (part, p) in enumerate(zip(parts, params, strict=True)):
            if i == len(layers):
                features = h
            variables = {"params": p, "batch_stats": part.stats}
            everything = jnp.ones(len(h), bool)
            h, new = part.stage.apply(variables, h, everything, train=True)
            stats.append(new)
        return log_loss(h, labels), (features, stats)

    (value, (features, stats)), grads = jax.value_and_grad(loss, has_aux=True)(
        [part.params for part in parts]
    )
    for part, grad, new in zip(parts, grads, stats, strict=True):
        part.sgd(grad, new, rate, momentum, weight_decay)
    return features, float(value) * len(labels)


def train_jointly(
    client, exit, server, final, x, labels, rates, share, momentum, weight_decay
):
    """One step of split learning, with the exit's gradient scaled by ``share``.

    Layers take the gradient of the final loss and ``share`` times that of the exit's;
    the exit head takes the whole of its own. Returns both sums of losses.
    """
    parts = [*client, exit, *server, final]
    cut = len(client)

    def losses(params):
        stats = {}

        def run(n, h):
            variables = {"params": params[n], "batch_stats": parts[n].stats}
            everything = jnp.ones(len(h), bool)
            h, stats[n] = parts[n].stage.apply(variables, h, everything, train=True)
            return h

        h = x
        for n in range(cut):
            h = run(n, h)
        exit_loss = log_loss(run(cut, h), labels)
        for n in range(cut + 1, len(parts)):
            h = run(n, h)
        return (exit_loss, log_loss(h, labels)), stats

    params = [part.params for part in parts]
    (exit_loss, final_loss), stats = losses(params)
    of_exit = jax.grad(lambda p: losses(p)[0][0])(params)
    of_final = jax.grad(lambda p: losses(p)[0][1])(params)
    for n, part in enumerate(parts):
        grads = jax.tree.map(lambda e, f: share * e + f, of_exit[n], of_final[n])
        if n == cut:
            grads = of_exit[n]
        rate = rates[0] if n <= cut else rates[1]
        part.sgd(grads, stats[n], rate, momentum, weight_decay)
    return float(exit_loss) * len(labels), float(final_loss) * len(labels)


class Reference:
    """A federation: a list of layers and a head for each client, and its server."""

    def __init__(
        self, model, network, cuts, *, shared, server_lr_scale, sgd, joint=None
    ):
        """Slices of one network for everyone; ``sgd`` is momentum, weight decay.

        ``joint`` is None for a detached cut, else the share of the exit's gradient.
        """
        self.cuts = cuts  # id -> cut
        self.joint = joint
        self.shared = shared
        self.scale = server_lr_scale
        self.sgd = sgd
        self.client_layers, self.exits = {}, {}
        self.server_layers, self.finals = {}, {}

        def layer(i):
            return Layer(model.stages[i], network.layers[i])

        depth = len(model.stages)
        if shared:
            one_server = {i: layer(i) for i in range(depth)}
            one_final = Layer(model.final_head, network.final_head)
        for i, cut in cuts.items():
            self.client_layers[i] = [layer(j) for j in range(cut)]
            self.exits[i] = Layer(
                model.exit_heads[cut - 1], network.exit_heads[cut - 1]
            )
            if shared:  # the very same objects
                self.server_layers[i] = [one_server[j] for j in range(cut, depth)]
                self.finals[i] = one_final
            else:
                self.server_layers[i] = [layer(j) for j in range(cut, depth)]
                self.finals[i] = Layer(model.final_head, network.final_head)

    def turn(self, i, x, labels, rate):
        """A client's batch, and the server's on the features it sends."""
        if self.joint is not None:
            return train_jointly(
                self.client_layers[i],
                self.exits[i],
                self.server_layers[i],
                self.finals[i],
                x,
                labels,
                (rate, rate * self.scale),
                self.joint,
                *self.sgd,
            )
        features, exit_loss = train_branch(
            self.client_layers[i], self.exits[i], x, labels, rate, *self.sgd
        )
        _, server_loss = train_branch(
            self.server_layers[i],
            self.finals[i],
            features,
            labels,
            rate * self.scale,
            *self.sgd,
        )
        return exit_loss, server_loss

    def holders(self, average):
        """For every layer and head, its holders as (client, layer) pairs."""
        found = {}
        for i, cut in self.cuts.items():
            if average != "clients":
                for j, layer in enumerate(self.server_layers[i]):
                    found.setdefault(cut + j, []).append((i, layer))
                found.setdefault("final", []).append((i, self.finals[i]))
            if average != "servers":
                for j, layer in enumerate(self.client_layers[i]):
                    found.setdefault(j, []).append((i, layer))
                found.setdefault(("exit", cut), []).append((i, self.exits[i]))
        return found.values()

    def average(self, weights, average, batch_norm, optimizer_state):
        """The weighted mean of each layer over the holders that took part, to all."""
        for holders in self.holders(average):
            total = sum(weights[i] for i, _ in holders)
            if total == 0:
                continue

            def mean(trees, holders=holders, total=total):
                shares = [weights[i] / total for i, _ in holders]
                return jax.tree.map(
                    lambda *leaves: sum(
                        s * leaf for s, leaf in zip(shares, leaves, strict=True)
                    ),
                    *trees,
                )

            new = {
                name: mean([getattr(layer, name) for _, layer in holders])
                for name in ("params", "stats", "momentum")
            }
            for _, layer in holders:
                own = dict(layer.params), layer.stats, dict(layer.momentum)
                layer.params, layer.stats = dict(new["params"]), new["stats"]
                if optimizer_state == "average":
                    layer.momentum = dict(new["momentum"])
                if optimizer_state == "reset":
                    layer.momentum = jax.tree.map(jnp.zeros_like, layer.momentum)
                if batch_norm == "keep_local":
                    layer.stats = own[1]
                    for name in layer.stats:
                        layer.params[name] = own[0][name]
                        if optimizer_state == "average":
                            layer.momentum[name] = own[2][name]

    def round(
        self, images, labels, plan, rates, *, ids, turn, sizes, averaging, number
    ):
        """One round.

        Args:
          images: normalised, [M, H, W, C].
          labels: [M].
          plan: the draw; slot n is client ids[n].
          rates: the learning rate of each step.
          ids: client ids by slot; -1 where it is empty.
          turn: "batch" or "epoch".
          sizes: id -> samples.
          averaging: None, or a dict of period, unit, average, weights, batch_norm,
            optimizer_state.
          number: rounds done before.
        """
        losses = {i: np.zeros(2) for i in ids}
        weights = dict.fromkeys(self.cuts, 0.0)
        for n, i in enumerate(ids):
            if plan.active[n]:
                uniform = averaging and averaging["weights"] == "uniform"
                weights[i] = 1.0 if uniform else float(sizes[i])

        def run(t, n):
            rows = plan.indices[t, n][plan.mask[t, n]]
            if len(rows) > 0:
                x = jnp.asarray(images[rows])
                y = [int(label) for label in labels[rows]]
                losses[ids[n]] += self.turn(ids[n], x, y, float(rates[t]))

        def average_if(unit, count):
            if averaging and averaging["period"] and averaging["unit"] == unit:
                if count % averaging["period"] == 0:
                    self.average(
                        weights,
                        averaging["average"],
                        averaging["batch_norm"],
                        averaging["optimizer_state"],
                    )

        steps = len(plan.indices)
        if turn == "epoch":
            for n in plan.order[0]:
                for t in range(steps):
                    run(t, n)
        else:
            for t in range(steps):
                for n in plan.order[t]:
                    run(t, n)
                average_if("steps", number * steps + t + 1)
        average_if("rounds", number + 1)
        return losses
