"""Weights by name: OpenAI's CLIPs, kept in one folder and checked by SHA-256, and repositories of Hugging Face."""

import http.client
import os
import socket
import ssl
import sys
import urllib.error
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from checkpoints.beside import CONFIG, NEWER_PROCESSOR, OPEN_CLIP, PROCESSOR
from checkpoints.whole import file_sha256

BASE_URL = "https://openaipublic.azureedge.net/clip/models"
OPENAI_CLIP = {  # name -> file name, SHA-256
    "ViT-B/32": ("ViT-B-32.pt", "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"),
    "ViT-B/16": ("ViT-B-16.pt", "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"),
    "ViT-L/14": ("ViT-L-14.pt", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"),
}
HUB = "hf-hub:"  # how names of Hugging Face repositories begin
CONFIGS = (OPEN_CLIP, CONFIG, PROCESSOR, NEWER_PROCESSOR)
HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors", "pytorch_model.bin")
SILENCE_S = 30.0  # a server that sends nothing for so long is given up
# What ends a transfer; any other OSError comes from the folder.
TRANSFER_ERRORS = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


class DownloadError(RuntimeError):
    """A file could not be fetched; the message says what to do by hand."""


def fetch_clip(name: str, folder: Path, base_url: str = BASE_URL) -> Path:
    """Path of the OpenAI CLIP weights `name` (a key of OPENAI_CLIP) in `folder`, downloaded if they are not there.

    DownloadError when the file can be neither found nor fetched.
    """
    file_name, sha256 = OPENAI_CLIP[name]
    return fetch_file(f"{base_url}/{sha256}/{file_name}", sha256, folder / file_name)


def fetch_file(url: str, sha256: str, target: Path) -> Path:
    """Make `target` the file at `url` with this SHA-256 and return it; nothing is downloaded if it already is.

    A file with another SHA-256 is moved to `<target>.wrong`. Processes take turns. DownloadError when it fails.
    """
    place = f"the folder {target.parent} (--cache_dir) under the name {target.name}"
    by_hand = f"Without a connection, fetch {url} on another machine and put it into {place}."
    try:
        if target.is_file() and file_sha256(target) == sha256:
            return target  # before anything is written: the folder may be read-only
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if target.exists():
                found, wrong = file_sha256(target), f"{target}.wrong"
                if found == sha256:  # fetched by another process in the meantime
                    return target
                os.replace(target, wrong)
                print(f"{target} has SHA-256 {found}, expected {sha256}: moved to {wrong}", file=sys.stderr)
            for part in target.parent.glob(f"{target.name}.*.partial"):  # as torch.hub names what a killed process left
                part.unlink()
            print(f"downloading {url} to {target}", file=sys.stderr)
            before = socket.getdefaulttimeout()
            socket.setdefaulttimeout(SILENCE_S)  # torch.hub would wait for ever
            try:
                torch.hub.download_url_to_file(url, str(target), sha256, progress=sys.stderr.isatty())
            finally:
                socket.setdefaulttimeout(before)
            return target
    except RuntimeError as error:  # torch.hub's, for another SHA-256; it has removed what came
        cause = "The connection was cut, or a proxy or a login page answered in the server's place"
        remedy = f"{cause}: try again, or open the address in a browser. {by_hand}"
        raise DownloadError(f"{url} did not give the expected file: {error}. {remedy}") from error
    except TRANSFER_ERRORS as error:
        raise DownloadError(f"cannot download {url}: {str(error) or type(error).__name__}. {by_hand}") from error
    except OSError as error:
        problem = f"cannot keep {target.name} in the weights folder {target.parent}: {error.strerror or error}"
        remedy = "Give a folder that you can write to and that has about 1 GB free: --cache_dir DIR"
        raise DownloadError(f"{problem}. {remedy}") from error


def fetch_from_hub(name: str, download: bool = True) -> Path:
    """The weights of ``hf-hub:org/name``, or ``hf-hub:org/name/file``, with the configuration beside them.

    ``@revision`` may follow.

    They lie in Hugging Face's own cache, under HF_HOME; HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE mean what they mean
    there. download: False takes them from the cache only, and a path that does not exist says that they are not there.
    DownloadError when they can be neither found nor fetched.
    """
    from huggingface_hub import hf_hub_download  # here, as it takes a third of a second
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    place, _, revision = name.removeprefix(HUB).partition("@")
    repository, own = "/".join(place.split("/")[:2]), "/".join(place.split("/")[2:])
    weights = (own,) if own else HUB_FILES
    where: dict[str, Any] = {"revision": revision or None, "local_files_only": not download}
    reason: Exception | None = None
    for files in (CONFIGS, weights):  # what stands beside weights first: it tells how to read them
        for file in files:
            try:
                found = Path(hf_hub_download(repository, file, **where))
                if files is weights:
                    return found
            except EntryNotFoundError as error:  # not in the repository, or neither in the cache nor to be reached
                reason = error
            except (HfHubHTTPError, HFValidationError, OSError) as error:
                raise DownloadError(f"--pretrained_clip_name {name}: {str(error).splitlines()[0]}") from error
    if not download:
        return Path(name) / weights[0]
    by_hand = f"Without a connection, run `hf download {repository}` on another machine and copy its cache (HF_HOME)"
    raise DownloadError(
        f"--pretrained_clip_name {name}: none of {', '.join(weights)} in the cache or to be fetched "
        f"({str(reason).splitlines()[0]}). {by_hand}"
    ) from reason
