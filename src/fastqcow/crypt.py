"""How the data clusters of an encrypted image are decrypted: keys from a password, ciphers from other people's libraries.

The modes of operation and the initialisation vectors are in the core (crypt.c), which asks the functions made here to run blocks
through a cipher. AES, which nearly every image has, comes from the package cryptography; Serpent, Twofish and CAST5, which QEMU can
also be told to use, from the system's libnettle, the library that it takes them from itself.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import hashlib
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from fastqcow._reader import Crypt
from fastqcow.errors import FormatError, PasswordError, UnsupportedError
from fastqcow.header import AES

if TYPE_CHECKING:
    from fastqcow._reader import Source
    from fastqcow.header import Header

    # A password, a function that is called with the path of each encrypted file of the chain and returns its password, or none.
    Password: TypeAlias = str | bytes | Callable[[str], str | bytes | None] | None

__all__ = ["BlockCipher", "Scheme", "block_cipher", "open_crypt"]


class BlockCipher(NamedTuple):
    """A cipher with its key: bytes in, as many bytes out, each block for itself."""

    block_nbytes: int
    encrypt: Callable[[bytes], bytes]
    decrypt: Callable[[bytes], bytes]


class Scheme(NamedTuple):
    """A cipher and how it is used, by QEMU's names.

    Attributes:
        cipher: "aes", "serpent", "twofish" or "cast5".
        mode: "ecb", "cbc", "ctr" or "xts".
        vectors: "plain", "plain64" or "essiv".
        vectors_hash: what makes a key of the key, for "essiv".
    """

    cipher: str
    mode: str
    vectors: str
    vectors_hash: str | None

    def key_nbytes(self, nbytes: int) -> int:
        """Of the cipher, where the scheme's is `nbytes` long."""
        return nbytes // 2 if self.mode == "xts" else nbytes

    def crypt(self, key: bytes, *, by_guest_off: bool) -> Crypt:
        """Decrypts with a key.

        Raises:
            UnsupportedError: a library is missing, or knows no such cipher.
        """
        nbytes = self.key_nbytes(len(key))
        data = block_cipher(self.cipher, key[:nbytes])
        tweaks = block_cipher(self.cipher, key[nbytes:]).encrypt if self.mode == "xts" else None
        vectors = None
        if self.vectors == "essiv":
            assert self.vectors_hash is not None
            vectors = block_cipher(self.cipher, hashlib.new(self.vectors_hash, key).digest()).encrypt
        return Crypt(
            self.mode,
            self.vectors,
            data.block_nbytes,
            by_guest_off=by_guest_off,
            data=data.decrypt,
            counters=data.encrypt,
            tweaks=tweaks,
            vector_keys=vectors,
        )


def open_crypt(image: Source, header: Header, password: Password, hashings: int) -> tuple[Crypt, int]:
    """What decrypts the data clusters of an encrypted image; and how often passwords of the chain are hashed so far, if all slots
    are tried: before this file it is `hashings`.

    Raises:
        PasswordError: the password is missing or wrong. (Of the legacy AES encryption nothing tells that it is wrong.)
        FormatError: the encryption header is damaged.
        TypeError, ValueError: something that is no password.
        UnsupportedError: a cipher or a hash that no library here has.
    """
    if callable(password):
        password = password(image.path)
    if password is None:
        raise PasswordError("the image is encrypted; its password is needed (password=, --password-file)", path=image.path)
    secret = _bytes_of(password)
    if header.crypt_method == AES:
        return Scheme("aes", "cbc", "plain64", None).crypt(secret[:16].ljust(16, b"\0"), by_guest_off=True), hashings
    from fastqcow.luks import CHAIN_HASHINGS_MAX, LuksHeader

    luks = LuksHeader.read(image.pread, header, image.path)
    hashings += luks.hashings
    if hashings > CHAIN_HASHINGS_MAX:
        raise FormatError(f"the passwords of the chain are to be hashed more than {CHAIN_HASHINGS_MAX} times", path=image.path)
    return luks.scheme.crypt(luks.unlock(image.pread, secret), by_guest_off=False), hashings


def _bytes_of(password: str | bytes) -> bytes:
    if isinstance(password, str):
        try:
            return password.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            # An error that held the password would be logged with it.
            raise ValueError("the password has characters that are none") from None
    if not isinstance(password, (bytes, bytearray, memoryview)):
        raise TypeError(f"a password is text or bytes, not {type(password).__name__}")
    return bytes(password)


def block_cipher(name: str, key: bytes) -> BlockCipher:
    """A cipher by its name in LUKS headers.

    Raises:
        UnsupportedError: the library that has it is not installed, or there is none.
    """
    if name == "aes":
        return _aes(key)
    return _by_nettle("cast128" if name == "cast5" else f"{name}{len(key) * 8}", key)


def _aes(key: bytes) -> BlockCipher:
    try:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
    except ImportError:
        raise UnsupportedError("AES needs the package cryptography; install it, or fastqcow[crypto]") from None
    # An object of its own for each call: they are not made for several threads at once.
    cipher = Cipher(algorithms.AES(key), modes.ECB())
    return BlockCipher(16, lambda data: cipher.encryptor().update(data), lambda data: cipher.decryptor().update(data))


class _NettleCipher(ctypes.Structure):
    """struct nettle_cipher of nettle/nettle-meta.h, which every cipher there has one of."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("context_size", ctypes.c_uint),
        ("block_size", ctypes.c_uint),
        ("key_size", ctypes.c_uint),
        ("set_encrypt_key", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_char_p)),
        ("set_decrypt_key", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_char_p)),
        ("encrypt", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_char_p)),
        ("decrypt", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_char_p)),
    )


@cache
def _nettle() -> ctypes.CDLL | None:
    path = ctypes.util.find_library("nettle")
    return ctypes.CDLL(path) if path else None


def _by_nettle(name: str, key: bytes) -> BlockCipher:
    library = _nettle()
    try:
        if library is None:
            raise UnsupportedError(f"the cipher {name} needs the library nettle, which is not installed")
        cipher = _NettleCipher.in_dll(library, f"nettle_{name}")
    except ValueError:
        raise UnsupportedError(f"the cipher {name} is not one that the library nettle knows") from None
    assert len(key) == cipher.key_size

    def runner(set_key: Any, run: Any) -> Callable[[bytes], bytes]:
        context = ctypes.create_string_buffer(cipher.context_size)
        set_key(context, key)

        def crypt(data: bytes) -> bytes:
            out = ctypes.create_string_buffer(len(data))
            run(context, len(data), out, data)
            return out.raw

        return crypt

    return BlockCipher(
        cipher.block_size, runner(cipher.set_encrypt_key, cipher.encrypt), runner(cipher.set_decrypt_key, cipher.decrypt)
    )
