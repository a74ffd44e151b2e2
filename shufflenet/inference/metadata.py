"""What is known of a trained network besides its weights."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Metadata:
    """What checkpoints and .onnx files hold, so that a network can be used."""

    model_name: str
    classes: list[str]  # in the order of the outputs
    preprocessing: dict  # resize, crop, mean, std: model.default_preprocessing
    args: dict = field(default_factory=dict)  # of train.py; of a bare state dict there are none

    def __str__(self) -> str:
        names = ", ".join(self.classes[:5]) + (", …" if len(self.classes) > 5 else "")
        sizes = f"resize {self.preprocessing['resize']}, crop {self.preprocessing['crop']}"
        return f"{self.model_name}, {len(self.classes)} classes ({names}), {sizes}"
