"""The same service for LitServe; in a file of its own, since its workers are new processes that have to find it. See server.py."""

from __future__ import annotations

import litserve
import numpy as np

from adaptkit.deployment.folder import open_folder

class Api(litserve.LitAPI):
    "One image after the other."

    def __init__(self, path: str, **how) -> None:
        super().__init__(**how)
        self.path = path

    def setup(self, device) -> None:
        self.model = open_folder(self.path)
        self.session = self.model.session()

    def decode_request(self, request):
        return self.model.read([request["image"].file.read()])

    def predict(self, inputs):
        return self.session(inputs).logits

    def encode_response(self, logits):
        row = np.asarray(logits).reshape(-1)
        e = np.exp(row - row.max())
        p = (e / e.sum()).tolist()
        return {"class": self.model.classes[int(np.argmax(p))], "probabilities": p}


class Batched(Api):
    "Several images in a call."

    def batch(self, parts):
        return {"images": np.concatenate([p["images"] for p in parts])}

    def unbatch(self, logits):
        return list(logits)
