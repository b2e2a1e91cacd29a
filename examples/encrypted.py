"""Encryption as a layer: the target below never sees the clients' bytes.

head -c 64 /dev/urandom > disk.key
pyublk add file disk.img --size 1G --layer examples/encrypted.py:Encrypted:key=disk.key

AES in XTS mode, each sector of 512 bytes with its number as the tweak, as dm-crypt's
aes-xts-plain64 has it. Needs the package `cryptography`.
"""

from pathlib import Path

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

import pyublk

SECTOR = 512


class Encrypted(pyublk.Layer):
    recoverable = True

    def __init__(self, below: pyublk.Target, key: Path) -> None:
        super().__init__(below)
        self._key = Path(key).read_bytes()
        if len(self._key) not in (32, 64):
            raise ValueError(f"{key} has {len(self._key)} bytes: AES-XTS takes a key of 32 or 64")

    def _cipher(self, offset: int) -> "Cipher[modes.XTS]":
        tweak = (offset // SECTOR).to_bytes(16, "little")
        return Cipher(algorithms.AES(self._key), modes.XTS(tweak))

    def read(self, offset: int, buffer: memoryview) -> None:
        self.below.read(offset, buffer)
        for at in range(0, len(buffer), SECTOR):
            sector = buffer[at : at + SECTOR]
            sector[:] = self._cipher(offset + at).decryptor().update(sector)

    def write(self, offset: int, data: memoryview) -> None:
        secret = bytearray(len(data))
        for at in range(0, len(data), SECTOR):
            cipher = self._cipher(offset + at).encryptor()
            secret[at : at + SECTOR] = cipher.update(data[at : at + SECTOR])
        self.below.write(offset, memoryview(secret))
