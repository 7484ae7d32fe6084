"""A model, made once per worker, that gets an array and reads it in place: which chord is this sound?

    forkring serve --pool chords:2=chords.py:Chords
    python chords.py HOST:PORT

The payload is mono sound, float32, 16,000 samples a second. The model sums the spectrum into the twelve pitch classes, and
looks which chord's pattern is the most like it. The client makes up the sound of some chords, with overtones and noise.
"""

import json
import sys

import numpy as np

RATE = 16_000
NAMES = ["C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B"]
# Semitones above the root, of a major and a minor triad.
KINDS = {"major": (0, 4, 7), "minor": (0, 3, 7)}


class Chords:
    def __init__(self):
        """What takes long: here two matrices, with others a file of weights."""
        self.size = 8192
        self.window = np.hanning(self.size).astype("float32")
        frequencies = np.fft.rfftfreq(self.size, 1 / RATE)
        heard = (frequencies > 100) & (frequencies < 2000)
        # Note 69 is the A of 440 Hz, and 60 is a C.
        notes = 69 + 12 * np.log2(np.where(heard, frequencies, 440) / 440)
        distance = (notes[:, None] - np.arange(12) + 6) % 12 - 6
        self.pitches = np.where(heard[:, None], np.exp(-((distance / 0.3) ** 2)), 0).astype("float32")
        self.labels = [f"{name} {kind}" for kind in KINDS for name in NAMES]
        patterns = np.zeros((len(self.labels), 12), "float32")
        for row, label in enumerate(self.labels):
            name, kind = label.split()
            patterns[row, (NAMES.index(name) + np.array(KINDS[kind])) % 12] = 1
        self.patterns = patterns / np.linalg.norm(patterns, axis=1, keepdims=True)

    def __call__(self, item):
        # No copy: these are the bytes that the server received.
        sound = item.numpy("float32")
        if len(sound) < self.size:
            raise ValueError(f"{len(sound)} samples are too few: the model takes {self.size} or more")
        windows = np.lib.stride_tricks.sliding_window_view(sound, self.size)[:: self.size // 2]
        spectrum = np.abs(np.fft.rfft(windows * self.window, axis=1)).mean(axis=0)
        chroma = spectrum @ self.pitches
        likeness = self.patterns @ chroma / (np.linalg.norm(chroma) or 1)
        best = int(likeness.argmax())
        return json.dumps({"chord": self.labels[best], "likeness": round(float(likeness[best]), 3)})


def sound_of(name, kind, seconds=2.0):
    """A chord as a plucked string might sound it."""
    random = np.random.default_rng(0)
    time = np.arange(int(seconds * RATE)) / RATE
    sound = 0.05 * random.standard_normal(len(time))
    for semitones in KINDS[kind]:
        frequency = 440 * 2 ** ((NAMES.index(name) + semitones - 9) / 12)
        for overtone in (1, 2, 3):
            sound += np.sin(2 * np.pi * frequency * overtone * time) / overtone**2
    return (sound * np.exp(-time)).astype("float32")


def main(address):
    # A worker needs nothing of this.
    from forkring.client import Client

    chords = [(name, kind) for kind in KINDS for name in NAMES]
    with Client(address, pool="chords") as client:
        for result in client.process(sound_of(*chord) for chord in chords):
            if result.error:
                raise result.error
            answer = json.loads(result.payload)
            print(f"{' '.join(chords[result.id]):9} sounds like {answer['chord']:9} {answer['likeness']:.3f}")


if __name__ == "__main__":
    main(sys.argv[1])
