"""Plain chat: a few exchanges without video, so that a small model keeps its ability to chat.

A language model fine-tuned only on captions answers a greeting with a caption.
"""

import random

import torch
from torch.utils.data import Dataset

from flash_vstream.synthetic.questions import Turn
from flash_vstream.train.datasets import Sample

CHAT: tuple[tuple[str, str], ...] = (
    ("Hello!", "Hello! What would you like to know about the video?"),
    ("Hi, how are you?", "I am fine, thank you. How can I help?"),
    ("Good morning.", "Good morning! Ask me about what I have seen."),
    ("Good evening!", "Good evening! How can I help you?"),
    ("Who are you?", "I am nano, a small model that watches video and answers questions about it."),
    ("What is your name?", "My name is nano."),
    ("What can you do?", "I watch a video stream, remember what happened, and answer questions about it at any time."),
    (
        "How do you remember things?",
        "I keep a small memory of the stream: its scenes, their times, and the newest picture.",
    ),
    ("Can you hear?", "No, I only see pictures. I do not hear sound."),
    ("Can you read text?", "Hardly. I was not trained to read text in pictures."),
    ("Are you always right?", "No. I am a small model and I make mistakes, so please check what matters."),
    ("Thank you.", "You are welcome!"),
    ("Thanks, that was helpful.", "I am glad that it helped."),
    ("Goodbye!", "Goodbye! Have a nice day."),
    ("What is the capital of France?", "The capital of France is Paris."),
    ("What is the capital of Italy?", "The capital of Italy is Rome."),
    ("What is the capital of Japan?", "The capital of Japan is Tokyo."),
    ("How many days are there in a week?", "There are seven days in a week."),
    ("How many months are there in a year?", "There are twelve months in a year."),
    ("How many minutes are there in an hour?", "There are 60 minutes in an hour."),
    ("How many legs does a spider have?", "A spider has eight legs."),
    ("What is 2 plus 3?", "2 plus 3 is 5."),
    ("What is 7 plus 5?", "7 plus 5 is 12."),
    ("What colour is the sky?", "On a clear day the sky is blue."),
    ("What colour is grass?", "Grass is green."),
    ("What do dogs eat?", "Dogs eat meat and dog food, and they like treats."),
    ("What is a bicycle?", "A bicycle is a vehicle with two wheels that is moved by pedals."),
    ("What is snow?", "Snow is frozen water that falls from clouds as small white crystals."),
    ("Why do people swim?", "People swim for exercise, for sport and for fun."),
    ("What is a camera?", "A camera is a device that takes pictures or records video."),
    (
        "What is a video?",
        "A video is a series of pictures that are shown one after another, so that they seem to move.",
    ),
    ("Which is larger, an elephant or a mouse?", "An elephant is much larger than a mouse."),
    ("What is the opposite of hot?", "The opposite of hot is cold."),
    ("Name three fruits.", "Apples, bananas and oranges."),
    ("Name two animals that can fly.", "Birds and bats can fly."),
    ("Name the four seasons.", "Spring, summer, autumn and winter."),
    ("Tell me a joke.", "Why did the bicycle fall over? Because it was two-tired."),
    ("Write a sentence about the sea.", "The sea is wide and blue, and its waves never rest."),
    ("Write a sentence about a dog.", "The dog ran over the field with its tail in the air."),
    (
        "What is machine learning?",
        "Machine learning is a way for computers to learn from examples instead of fixed rules.",
    ),
    (
        "What is a language model?",
        "A language model is a program that learned from much text to predict the next word.",
    ),
    ("How do I make tea?", "Boil water, pour it over the tea, and wait for about three minutes."),
    ("Is the earth round?", "Yes, the earth is round."),
    ("Can fish fly?", "No, but some fish can jump out of the water and glide for a while."),
)
"""Questions and answers written for this project."""


class ChatSamples(Dataset[Sample]):
    """Exchanges from ``CHAT``, ``turns`` per sample, drawn from ``seed`` and the index; turns are independent."""

    def __init__(self, turns: int, length: int, seed: str):
        self.turns = turns
        self.length = length
        self.seed = seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        drawn = random.Random(f"{self.seed}/{index}").sample(CHAT, self.turns)
        turns = tuple(Turn(question, (answer,)) for question, answer in drawn)
        return Sample(None, torch.zeros(0, dtype=torch.float64), turns)
