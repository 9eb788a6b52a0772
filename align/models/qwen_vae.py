"""Images through a VAE made for video, without the work that video would need."""

from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from torch import Tensor, nn
from torch.nn.functional import conv2d


class SingleFrameConv3d(QwenImageCausalConv3d):
    """diffusers' convolution, two-dimensional where there is one frame; same weights, to rounding the same results.

    It is causal: before the first frame it sees zeros, so that of a kernel's taps in time only the last meets an image.
    The others are two thirds of the work, and libraries are quicker at two dimensions than at three besides.
    """

    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        """``x`` (batch, channels, frames, height, width), ``cache_x`` the frames before it, if there are any."""
        left, _, top, _, before, _ = self._padding
        if cache_x is not None or x.shape[2] != 1 or before != self.kernel_size[0] - 1:
            return super().forward(x, cache_x)
        stride, dilation = self.stride[1:], self.dilation[1:]
        weight = self.weight[:, :, -1]
        return conv2d(x[:, :, 0], weight, self.bias, stride, (top, left), dilation, self.groups).unsqueeze(2)


def speed_up_images(module: nn.Module) -> None:
    """Let a VAE, its encoder or its decoder pass single images two to five times as fast (tests/bench/vae.py).

    Changes the class of its convolutions in place: weights, their names and what several frames give stay as they were.
    """
    for convolution in module.modules():
        if type(convolution) is QwenImageCausalConv3d:
            convolution.__class__ = SingleFrameConv3d
