"""The plain net's training step in PyTorch, to compare the speed of JAX's with.

PyTorch is no dependency of this project; it is imported by the one function that needs it.
"""

from collections.abc import Callable

from orthojax.parallel.cores import usable_cores


def make_step(
    depth: int,
    batch: int,
    *,
    channels_last: bool,
    compiled: bool | str = False,
    width: int = 16,
    device: str = "cpu",
    dtype: str = "float32",
    wait: bool = True,
) -> Callable[[], object]:
    """One training step of `PlainNet(depth)` on random 32×32 images; returns the loss.

    Forward, backward, and SGD with momentum 0.9 and weight decay 1e-4 (learning rate 0.1), of the
    mean cross entropy over 10 classes, in float32: the net of `orthojax.models.PlainNet` with 16,
    32 and 64 channels, but padded by 1 on both sides at stride 2, as is usual in PyTorch.

    Args:
      depth: 6n + 2 layers.
      batch: images in a batch.
      channels_last: NHWC in memory, or else NCHW. Which is faster depends on the processor.
      compiled: the net by `torch.compile`, at the first call, which takes minutes, or the `mode`
        of that; False is eager.
      width: channels of the first stage.
      device: `cpu` or `cuda`.
      dtype: `float32`; `tf32`, which lets products of float32 have fewer bits; or `bfloat16`, by
        autocast.
      wait: return the loss as a number, for which the device is waited for; else as it is.
    """
    import torch
    from torch import nn

    torch.set_num_threads(usable_cores())
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    torch.manual_seed(0)
    layers, channels = [], 3
    for index in range(depth - 1):
        stage = max(0, index - 1) // ((depth - 2) // 3)
        features = width * 2**stage
        stride = 2 if features == 2 * channels else 1
        layers += [
            nn.Conv2d(channels, features, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(features),
            nn.ReLU(inplace=True),
        ]
        channels = features
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    net = net.to(device, memory_format=memory_format)
    images = torch.randn(batch, 3, 32, 32, device=device).contiguous(memory_format=memory_format)
    labels = torch.arange(batch, device=device) % 10
    mode = compiled if isinstance(compiled, str) else None
    forward = torch.compile(net, mode=mode) if compiled else net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    cross_entropy = nn.CrossEntropyLoss()

    def step():
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()
        return loss.item() if wait else loss

    return step
