"""One file over HTTP: tried again, gone on with, verified, renamed."""

import logging
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from datetime import datetime, timedelta
from email.message import Message
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit

from ..models.headers import SolarImageError
from ..models.modalities import MODALITIES
from ..models.readers import read_image

logger = logging.getLogger(__name__)

_ABSENT = (404, 410)
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_BLOCK = 1 << 18  # bytes read at a time
_DOWN = 3  # failures in a row after which a server gets one try a file
_LONGEST_WAIT = 300.0  # seconds
_AIA_SLACK = timedelta(minutes=2)  # between the minute of a name and the middle of the exposure


class Absent(Exception):
    """The server says that it has no such file."""


class Unavailable(Exception):
    """The file could not be had, in a sentence; perhaps another time or elsewhere."""


class _Failure(Exception):
    """A try that failed and may be repeated after `after` seconds; `keep` tells whether what came is a true part."""

    def __init__(self, reason: str, after: float = 0.0, keep: bool = True):
        super().__init__(reason)
        self.after, self.keep = after, keep


class Fetcher:
    """Fetches files, several threads at a time, and remembers which servers are down.

    Args:
        retries: Further tries after a failure that may pass.
        backoff: Seconds before the first of them; doubled each time, and stretched by up to a half at random.
        timeout: Seconds without an answer that count as a failure.
    """

    def __init__(self, *, retries: int = 4, backoff: float = 2.0, timeout: float = 60.0):
        self.retries, self.backoff, self.timeout = retries, backoff, timeout
        self._failures: Counter[str] = Counter()
        self._lock = threading.Lock()

    def fetch(self, url: str, path: Path, modality: str, when: datetime) -> int:
        """Downloads a file, unless it is another thing than its name promises.

        Args:
            url: Its address.
            path: Where it shall be; what has come of it lies beside it under `.{name}.part` until it is whole.
            modality: The channel that it must hold.
            when: The time that its name promises: HMI's slot (TAI, marked UTC), the minute of an AIA frame (UTC).

        Returns:
            Its length in bytes.

        Raises:
            Absent: The server has no such file.
            Unavailable: All tries failed.
        """
        host = urlsplit(url).netloc
        part = path.with_name(f".{path.name}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        tries = 1 if self._failures[host] >= _DOWN else self.retries + 1
        reason = ""
        for number in range(tries):
            try:
                self._receive(url, part)
                _verify(part, modality, when)
            except Absent:
                self._answered(host)
                raise
            except _Failure as failure:
                reason = str(failure)
                if not failure.keep:
                    part.unlink(missing_ok=True)
                if number + 1 < tries:
                    pause = self.backoff * 2**number * random.uniform(1.0, 1.5)
                    pause = min(max(pause, failure.after), _LONGEST_WAIT)
                    logger.info("%s: %s; again in %.1f s", url, reason, pause)
                    time.sleep(pause)
                continue
            self._answered(host)
            os.replace(part, path)
            return path.stat().st_size
        with self._lock:
            self._failures[host] += 1
        raise Unavailable(f"{reason} ({tries} tries)")

    def _answered(self, host: str) -> None:
        with self._lock:
            self._failures[host] = 0

    def _receive(self, url: str, part: Path) -> None:
        """Adds to the part what it lacks, or starts it anew."""
        have = part.stat().st_size if part.exists() else 0
        headers = {"User-Agent": "solarchip_hf", "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        try:
            with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=self.timeout) as answer:
                begin, total = _extent(answer.status, answer.headers, have)
                with part.open("ab" if begin else "wb") as stream:
                    while block := answer.read(_BLOCK):
                        stream.write(block)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in _ABSENT:
                raise Absent(url) from None
            if error.code == 416:  # the part is as long as the file, or longer
                raise _Failure("the server refused to go on with the part that is here", keep=False) from None
            if error.code not in _PASSING:
                raise Unavailable(f"HTTP {error.code} {error.reason}") from None
            raise _Failure(f"HTTP {error.code} {error.reason}", after=_seconds(error.headers)) from None
        except (OSError, HTTPException) as error:  # refused, reset, timed out, ended early
            raise _Failure(f"{type(error).__name__}: {error}") from None
        size = part.stat().st_size
        if total is not None and size != total:
            raise _Failure(f"{size} of {total} bytes came", keep=size < total)


def _extent(status: int, headers: Message, have: int) -> tuple[int, int | None]:
    """Where the answer's first byte belongs, and how long the whole file is (None where unknown)."""
    length = headers.get("Content-Length", "")
    if status == 206:
        span, _, whole = headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
        if not span.startswith(f"{have}-"):
            raise _Failure(f"the server sent {headers.get('Content-Range')!r} for bytes from {have}", keep=False)
        return have, int(whole) if whole.isdigit() else None
    return 0, int(length) if length.isdigit() else None


def _seconds(headers: Message | None) -> float:
    """Retry-After in seconds; 0 where it is absent or a date."""
    value = "" if headers is None else headers.get("Retry-After", "")
    return float(value) if value.isdigit() else 0.0


def _verify(part: Path, modality: str, when: datetime) -> None:
    """Refuses what is not the image that was asked for."""
    try:
        image = read_image(part, header_only=True)
    except (SolarImageError, OSError) as error:
        text = str(error).removeprefix(f"{part}: ")
        raise _Failure(f"what came is no such image: {text}", keep=False) from None
    if image.modality != modality:
        raise _Failure(f"expected an image of {modality}, got {image.modality or image.reason}", keep=False)
    hmi = MODALITIES[modality].instrument == "hmi"
    time_, slack = (image.time_nominal, timedelta(0)) if hmi else (image.time, _AIA_SLACK)
    if time_ is None or abs(time_ - when) > slack:
        raise _Failure(f"expected an image of {when:%Y-%m-%dT%H:%M}, got one of {time_}", keep=False)


__all__ = ["Absent", "Fetcher", "Unavailable"]
