"""Ask a running server about a stream with OpenAI's own client.

    flash-vstream serve --stream door=rtsp://camera.local/stream
    python examples/openai_client.py door "What is happening now?"

The answer is printed as it is generated. What OpenAI's format has no field for (the stream time, the
evidence) comes with the last chunk, under ``flash_vstream``.
"""

import argparse
import os

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stream", help="the name of a stream that the server watches")
    parser.add_argument("question", nargs="?", default="What is happening now?")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    options = parser.parse_args()

    # On loopback the server asks for no token, but the client insists on sending something.
    client = OpenAI(base_url=options.url, api_key=os.environ.get("FLASH_VSTREAM_TOKEN", "unused"))
    chunks = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "video_url", "video_url": {"url": f"stream:{options.stream}"}},
                    {"type": "text", "text": options.question},
                ],
            }
        ],
        max_tokens=96,
        stream=True,
    )
    extras = {}
    for chunk in chunks:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        extras = (chunk.model_extra or {}).get("flash_vstream") or extras
    print(f"\n(as of {extras['stream_time']:.1f} s of the stream)")
    for slot in sorted(extras["evidence"], key=lambda slot: -(slot["share"] or 0.0))[:3]:
        print(f"looked at {slot['start']:.1f}-{slot['end']:.1f} s in the {slot['part']} memory")


if __name__ == "__main__":
    main()
