"""Networks in plain PyTorch, written from the papers, with the names of torchvision.

They take any width, so that the tests stay small. Images are [B, C, H, W].
"""

import importlib
import os

import pytest


def import_torch():
    """PyTorch; where HSEE_REQUIRE_TORCH is set its absence is a failure."""
    if "HSEE_REQUIRE_TORCH" in os.environ:
        return importlib.import_module("torch")
    return pytest.importorskip("torch", reason="the extra `torch` is not installed")


def torch_resnet(counts, *, bottleneck, width, classes, channels=3, large=False):
    torch = import_torch()
    from torch import nn

    def conv(before, after, size, stride=1):
        return nn.Conv2d(before, after, size, stride, size // 2, bias=False)

    class Block(nn.Module):
        def __init__(self, before, inner, stride):
            super().__init__()
            after = 4 * inner if bottleneck else inner
            sizes = (1, 3, 1) if bottleneck else (3, 3)
            strides = (1, stride, 1) if bottleneck else (stride, 1)
            outputs = (*(inner,) * (len(sizes) - 1), after)
            inputs = (before, *outputs)
            self.count = len(sizes)
            for i in range(len(sizes)):
                layer = conv(inputs[i], outputs[i], sizes[i], strides[i])
                setattr(self, f"conv{i + 1}", layer)
                setattr(self, f"bn{i + 1}", nn.BatchNorm2d(outputs[i]))
            self.downsample = None
            if stride != 1 or before != after:
                self.downsample = nn.Sequential(
                    conv(before, after, 1, stride), nn.BatchNorm2d(after)
                )

        def forward(self, x):
            y = x
            for i in range(1, self.count + 1):
                y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
                y = torch.relu(y) if i < self.count else y
            return torch.relu(y + (self.downsample(x) if self.downsample else x))

    class ResNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = conv(channels, width, 7 if large else 3, 2 if large else 1)
            self.bn1 = nn.BatchNorm2d(width)
            self.pool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
            before = width
            for group, count in enumerate(counts):
                blocks = []
                for number in range(count):
                    stride = 2 if group and number == 0 else 1
                    inner = width * 2**group
                    blocks.append(Block(before, inner, stride))
                    before = 4 * inner if bottleneck else inner
                setattr(self, f"layer{group + 1}", nn.Sequential(*blocks))
            self.fc = nn.Linear(before, classes)

        def forward(self, x):
            x = self.pool(torch.relu(self.bn1(self.conv1(x))))
            for group in range(len(counts)):
                x = getattr(self, f"layer{group + 1}")(x)
            return self.fc(x.mean(dim=(2, 3)))

    return ResNet()


def torch_mobilenet(*, width, classes, channels=3, small=True):
    import_torch()
    from torch import nn

    def unit(before, after, size, stride=1, groups=1):
        return nn.Sequential(
            nn.Conv2d(before, after, size, stride, size // 2, 1, groups, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU6(),
        )

    class Block(nn.Module):
        def __init__(self, before, after, stride, expansion):
            super().__init__()
            inner = before * expansion
            layers = [unit(before, inner, 1)] if expansion > 1 else []
            layers.append(unit(inner, inner, 3, stride, inner))
            layers += [nn.Conv2d(inner, after, 1, bias=False), nn.BatchNorm2d(after)]
            self.conv = nn.Sequential(*layers)
            self.adds = stride == 1 and before == after

        def forward(self, x):
            return x + self.conv(x) if self.adds else self.conv(x)

    class MobileNetV2(nn.Module):
        def __init__(self):
            super().__init__()
            layers, before = [unit(channels, width, 3, 1 if small else 2)], width
            expansions = (1, 6, 6, 6, 6, 6, 6)
            outputs = (16, 24, 32, 64, 96, 160, 320)
            counts = (1, 2, 3, 4, 3, 3, 1)
            strides = (1, 1 if small else 2, 2, 2, 1, 2, 1)
            for t, c, n, s in zip(expansions, outputs, counts, strides, strict=True):
                for i in range(n):
                    after = round(c * width / 32)
                    layers.append(Block(before, after, s if i == 0 else 1, t))
                    before = after
            last = round(1280 * width / 32)
            self.features = nn.Sequential(*layers, unit(before, last, 1))
            self.classifier = nn.Sequential(nn.Identity(), nn.Linear(last, classes))

        def forward(self, x):
            return self.classifier(self.features(x).mean(dim=(2, 3)))

    return MobileNetV2()


def torch_mobilenet_v3(*, width, classes, channels=3, small=True):
    torch = import_torch()
    from torch import nn
    from torch.nn import functional

    def scaled(count):
        return round(count * width / 16)

    def unit(before, after, size, activation, stride=1, groups=1):
        return nn.Sequential(
            nn.Conv2d(before, after, size, stride, size // 2, 1, groups, bias=False),
            nn.BatchNorm2d(after, eps=1e-3),
            activation(),
        )

    class Squeeze(nn.Module):
        def __init__(self, features, inner):
            super().__init__()
            self.fc1 = nn.Conv2d(features, inner, 1)
            self.fc2 = nn.Conv2d(inner, features, 1)

        def forward(self, x):
            weights = self.fc2(torch.relu(self.fc1(x.mean((2, 3), keepdim=True))))
            return x * functional.hardsigmoid(weights)

    class Block(nn.Module):
        def __init__(self, before, size, inner, after, squeeze, activation, stride):
            super().__init__()
            layers = [unit(before, inner, 1, activation)] if inner != before else []
            layers.append(unit(inner, inner, size, activation, stride, inner))
            layers += [Squeeze(inner, squeeze)] if squeeze else []
            layers.append(unit(inner, after, 1, nn.Identity))
            self.block = nn.Sequential(*layers)
            self.adds = stride == 1 and before == after

        def forward(self, x):
            return x + self.block(x) if self.adds else self.block(x)

    class MobileNetV3(nn.Module):
        def __init__(self):
            super().__init__()
            swish, first = nn.Hardswish, 1 if small else 2
            layers, before = [unit(channels, width, 3, swish, first)], width
            sizes = (3, 3, 3, 5, 5, 5, 5, 5, 5, 5, 5)
            inner = (16, 72, 88, 96, 240, 240, 120, 144, 288, 576, 576)
            outputs = (16, 24, 24, 40, 40, 40, 48, 48, 96, 96, 96)
            # A quarter of the inner channels, to the nearest multiple of 8.
            squeezes = (8, 0, 0, 24, 64, 64, 32, 40, 72, 144, 144)
            strides = (first, 2, 1, 2, 1, 1, 1, 1, 2, 1, 1)
            for i, (size, stride) in enumerate(zip(sizes, strides, strict=True)):
                counts = map(scaled, (inner[i], outputs[i], squeezes[i]))
                activation = nn.ReLU if i < 3 else swish
                layers.append(Block(before, size, *counts, activation, stride))
                before = scaled(outputs[i])
            last, hidden = scaled(576), scaled(1024)
            self.features = nn.Sequential(*layers, unit(before, last, 1, swish))
            self.classifier = nn.Sequential(
                nn.Linear(last, hidden),
                swish(),
                nn.Identity(),
                nn.Linear(hidden, classes),
            )

        def forward(self, x):
            return self.classifier(self.features(x).mean(dim=(2, 3)))

    return MobileNetV3()


def torch_vit(*, size, patch, hidden, depth, heads, classes, channels=3):
    torch = import_torch()
    from torch import nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln_1 = nn.LayerNorm(hidden, eps=1e-6)
            self.self_attention = nn.MultiheadAttention(hidden, heads, batch_first=True)
            self.ln_2 = nn.LayerNorm(hidden, eps=1e-6)
            up, down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)
            same = nn.Identity()
            self.mlp = nn.Sequential(up, nn.GELU(), same, down)

        def forward(self, x):
            y = self.ln_1(x)
            x = x + self.self_attention(y, y, y, need_weights=False)[0]
            return x + self.mlp(self.ln_2(x))

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            places = 1 + (size // patch) ** 2
            self.pos_embedding = nn.Parameter(0.02 * torch.randn(1, places, hidden))
            self.layers = nn.ModuleDict(
                {f"encoder_layer_{i}": Block() for i in range(depth)}
            )
            self.ln = nn.LayerNorm(hidden, eps=1e-6)

        def forward(self, x):
            x = x + self.pos_embedding
            for layer in self.layers.values():
                x = layer(x)
            return self.ln(x)

    class ViT(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv_proj = nn.Conv2d(channels, hidden, patch, patch)
            self.class_token = nn.Parameter(torch.randn(1, 1, hidden))
            self.encoder = Encoder()
            self.heads = nn.ModuleDict({"head": nn.Linear(hidden, classes)})

        def forward(self, x):
            x = self.conv_proj(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1)
            return self.heads["head"](self.encoder(x)[:, 0])

    return ViT()
