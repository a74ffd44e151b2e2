"""What is known of a trained network besides its weights."""

from dataclasses import dataclass, field

from shufflenet.common.messages import listed


@dataclass(frozen=True)
class Metadata:
    """What checkpoints and .onnx files hold, so that a network can be used."""

    model_name: str
    classes: list[str]  # in the order of the outputs
    preprocessing: dict  # resize, crop, mean, std: model.default_preprocessing
    args: dict = field(default_factory=dict)  # of train.py; of a bare state dict there are none
    trained_on: list[int] = field(default_factory=list)  # folders.image_hashes; [] if not known

    def check(self) -> None:
        """ValueError, KeyError or TypeError unless all is of the kind that it should be."""
        sizes = [self.preprocessing[name] for name in ("resize", "crop")]
        scales = [float(x) for name in ("mean", "std") for x in self.preprocessing[name]]
        good = isinstance(self.classes, list) and isinstance(self.args, dict) and len(scales) == 6
        good = good and all(isinstance(name, str) for name in self.classes)
        good = good and all(isinstance(size, int) and 8 <= size <= 8192 for size in sizes)
        if not good or not all(isinstance(each, int) for each in self.trained_on):
            raise ValueError("classes, preprocessing or others are not what they should be")

    def __str__(self) -> str:
        names = listed(self.classes)
        sizes = f"resize {self.preprocessing['resize']}, crop {self.preprocessing['crop']}"
        return f"{self.model_name}, {len(self.classes)} classes ({names}), {sizes}"
