"""Are ImageNet weights from a package mapped to the right layers? Photographs that plainly show one
ImageNet class.

    python benchmarks/imagenet.py path/to/coco128/images

Prints how often the class is among the five best of the whole classifier. A single tensor in the
wrong place leaves nothing of it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
from torch import Tensor
from torchvision.transforms import v2

from detrellis.data.decode import read_image
from detrellis.nn.pretrained import find_source, in_order

MODELS = ("tf_efficientnet_lite0", "tf_efficientnet_lite1", "tf_efficientnet_lite2")
# COCO's image ids, chosen by looking at the pictures, and the class that each shows.
SHOWN = {
    **dict.fromkeys((34, 154), 340),  # zebra
    **dict.fromkeys((81, 540), 404),  # airliner
    **dict.fromkeys((64, 78), 409),  # analog clock
    **dict.fromkeys((194, 397, 450), 963),  # pizza
    **dict.fromkeys((599, 650), 281),  # tabby
    **dict.fromkeys((192, 544), 981),  # ballplayer
    **dict.fromkeys((612, 623), 850),  # teddy
    30: 883,  # vase
    36: 879,  # umbrella
    89: 827,  # stove
    257: 873,  # triumphal arch
    263: 385,  # Indian elephant
    307: 230,  # Shetland sheepdog
    312: 386,  # African elephant
    321: 934,  # hotdog
    459: 834,  # suit
    471: 779,  # school bus
    502: 295,  # American black bear
    510: 703,  # park bench
    605: 967,  # espresso
    636: 861,  # toilet seat
    643: 527,  # desktop computer
}


def classifier(name: str) -> tuple[torch.nn.Module, v2.Transform]:
    """The whole model with the package's weights,
    and what turns a picture `(3, H, W)` uint8 into its input.
    """
    source = find_source(name, None, resnet=False)
    model = timm.create_model(name)
    model.load_state_dict(in_order(source.read(), model.state_dict()), strict=False)
    side = model.default_cfg["input_size"][-1]
    resize = v2.Resize(round(side / model.default_cfg["crop_pct"]), v2.InterpolationMode.BICUBIC)
    normalise = v2.Normalize(source.mean, source.std)
    return model.eval(), v2.Compose(
        [resize, v2.CenterCrop(side), v2.ToDtype(torch.float32, scale=True), normalise]
    )


def main() -> None:
    """Print the share of photographs whose class is among the five best, for each model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", type=Path, help="folder of the data set's photographs")
    files = {int(path.stem): path for path in parser.parse_args().images.rglob("*.jpg")}
    pictures: dict[int, Tensor] = {image: read_image(files[image]) for image in SHOWN}
    for name in MODELS:
        model, transform = classifier(name)
        with torch.inference_mode():
            best = {
                i: model(transform(p)[None])[0].topk(5).indices.tolist()
                for i, p in pictures.items()
            }
        right = [image for image, kind in SHOWN.items() if kind in best[image]]
        missed = ", ".join(str(image) for image in SHOWN if image not in right)
        print(
            f"{name}: {len(right)} of {len(SHOWN)} among the five best; missed {missed or 'none'}"
        )


if __name__ == "__main__":
    main()
