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

    def __str__(self) -> str:
        names = listed(self.classes)
        sizes = f"resize {self.preprocessing['resize']}, crop {self.preprocessing['crop']}"
        return f"{self.model_name}, {len(self.classes)} classes ({names}), {sizes}"
