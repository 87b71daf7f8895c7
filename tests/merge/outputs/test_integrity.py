"""verify OUT: everything in the folder is accounted for, the manifest is as it was written, and signatures hold."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from merge_models import write_four_shards

from adapter_merge.api.merge import merge
from adapter_merge.api.options import MergeOptions
from adapter_merge.cli.main import group
from adapter_merge.errors import FileFormatError, InputError, MissingDependencyError
from adapter_merge.outputs.integrity import check_integrity, check_restored
from adapter_merge.outputs.manifest_seal import SEAL, sealed

pytestmark = pytest.mark.preloaded("torch", "model_signing.signing", "model_signing.verifying")
SHARD = "model-00002-of-00004.safetensors"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("integrity")
    merge(*write_four_shards(folder), folder / "out", MergeOptions(keep_preimage=True))
    return folder / "out"


@pytest.fixture
def out(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "out"))


def add_folder(out: Path) -> None:
    (out / "sub").mkdir()


def add_hidden(out: Path) -> None:
    (out / ".modeling_evil.py").write_text("import os")


def add_hidden_folder(out: Path) -> None:
    (out / ".git").mkdir()
    (out / ".git" / "config").write_text("")


def add_into_preimage(out: Path) -> None:
    (next(path for path in out.iterdir() if path.is_dir()) / ".more").write_text("")


def link_shard(out: Path) -> None:
    """To a file of the same bytes, which may change later."""
    (out / SHARD).rename(out.parent / "elsewhere")
    (out / SHARD).symlink_to(out.parent / "elsewhere")


def link_within(out: Path) -> None:
    (out / "config.json").rename(out / "other.json")
    (out / "config.json").symlink_to("other.json")


def link_manifest(out: Path) -> None:
    (out / "adapter_merge.json").rename(out.parent / "elsewhere")
    (out / "adapter_merge.json").symlink_to(out.parent / "elsewhere")


def link_out(out: Path) -> None:
    (out / "link").symlink_to("/")


def add_pipe(out: Path) -> None:
    os.mkfifo(out / "pipe")


ADDITIONS = (add_folder, add_hidden, add_hidden_folder, add_into_preimage, link_shard, link_within, link_manifest,
             link_out, add_pipe)  # fmt: skip


@pytest.mark.parametrize("change", ADDITIONS)
def test_everything_in_the_folder_is_accounted_for(out: Path, change: Callable[[Path], None]) -> None:
    check_integrity(out)
    change(out)
    with pytest.raises(FileFormatError, match=r"not in the manifest|symbolic link|not a regular file"):
        check_integrity(out)


def edit(out: Path, change: Callable[[dict[str, Any]], None], *, seal: bool) -> None:
    file = out / "adapter_merge.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(sealed(content) if seal else content, indent=2))


EDITS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "name of an adapter": lambda content: content["adapters"][0].update(name="another"),
    "hash of an adapter": lambda content: content["adapters"][0].update(sha256="0" * 64),
    "hashes of its files": lambda content: content["adapters"][0].update(files={"adapter_model.safetensors": "0" * 64}),
    "base": lambda content: content["base"].update(name="another"),
    "figures": lambda content: content["layers"].clear(),
    "a new key": lambda content: content.update(more=1),
    "no seal": lambda content: content.pop(SEAL),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_manifest_fails(out: Path, name: str) -> None:
    edit(out, EDITS[name], seal=False)
    with pytest.raises(FileFormatError, match=r"differs from what was written|has no seal"):
        check_integrity(out)
    with pytest.raises(FileFormatError, match=r"differs from what was written|has no seal"):
        check_restored(out, out)


@pytest.mark.parametrize("name", ["name of an adapter", "hash of an adapter", "hashes of its files"])
def test_adapters_that_were_edited_and_sealed_again_disagree_with_card_and_files(out: Path, name: str) -> None:
    edit(out, EDITS[name], seal=True)
    with pytest.raises(FileFormatError, match=r"not that of its files|names other adapters"):
        check_integrity(out)


def test_a_manifest_may_be_laid_out_anew_but_holds_no_key_twice(out: Path) -> None:
    file = out / "adapter_merge.json"
    file.write_text(json.dumps(json.loads(file.read_text())))
    check_integrity(out)
    file.write_text(file.read_text().replace('"adapters":', '"adapters": [], "adapters":', 1))
    with pytest.raises(FileFormatError, match="holds the key adapters twice"):
        check_integrity(out)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../b", "adapter_merge.json"])
def test_a_manifest_names_files_of_its_own_folder_only(out: Path, name: str) -> None:
    edit(out, lambda content: content["files"].update({name: "0" * 64}), seal=True)
    with pytest.raises(FileFormatError, match="files of the folder itself"):
        check_integrity(out)


def test_an_adapter_that_was_trained_again_since_is_told(written: Path, tmp_path: Path) -> None:
    base, adapter = write_four_shards(tmp_path)
    merge(base, adapter, tmp_path / "merged")
    assert check_integrity(tmp_path / "merged").changed == ()
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text() + " ")
    assert check_integrity(tmp_path / "merged").changed == (str(config),)
    with pytest.raises(FileFormatError, match="differs from the recorded file"):
        check_integrity(tmp_path / "merged", inputs=True)


def test_the_hubs_cache_is_links_to_its_own_blobs(out: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--me--merged" / "snapshots" / "abc"
    blobs = tmp_path / "models--me--merged" / "blobs"
    blobs.mkdir(parents=True)
    for file in [path for path in out.rglob("*") if path.is_file()]:
        link = snapshot / file.relative_to(out)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = blobs / hashlib.sha256(str(link).encode()).hexdigest()
        shutil.copyfile(file, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (snapshot / ".gitattributes").write_text("*.safetensors filter=lfs")
    found = check_integrity(snapshot)
    assert found.beside == (".gitattributes",)
    assert found.files == check_integrity(out).files
    (snapshot / SHARD).unlink()
    (snapshot / SHARD).symlink_to(out / SHARD)
    with pytest.raises(FileFormatError, match="symbolic link"):
        check_integrity(snapshot)


def verified(*arguments: str | Path) -> tuple[int, str]:
    code = "from adapter_merge.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "verify", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


# -- signatures ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two key pairs, a and b, by the cryptography package."""
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    folder = tmp_path_factory.mktemp("keys")
    for name in "ab":
        key = ec.generate_private_key(ec.SECP256R1())
        private = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
        public = key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
        (folder / f"{name}.pem").write_bytes(private)
        (folder / f"{name}.pub").write_bytes(public)
    return folder


def sign(out: Path, key: Path, *more: str) -> None:
    """As the documentation says, by model-signing's own command."""
    subprocess.run(
        [sys.executable, "-m", "model_signing", "sign", "key", str(out), "--private_key", str(key),
         "--signature", str(out / "model.sig"), *more],
        check=True, capture_output=True,
    )  # fmt: skip


def test_a_signature_holds_for_its_key_and_its_content_alone(out: Path, keys: Path) -> None:
    code, text = verified(out, "--signature", "--public-key", keys / "a.pub")
    assert (code, "is not signed" in text) == (1, True)
    code, text = verified(out)
    assert code == 0
    assert "unchanged since written (not signed: its author is unknown)" in text
    sign(out, keys / "a.pem")
    assert "its signature was not checked" in verified(out)[1]
    code, text = verified(out, "--signature", "--public-key", keys / "a.pub")
    assert code == 0, text
    assert f"signed by the owner of {keys / 'a.pub'}" in text
    code, text = verified(out, "--signature", "--public-key", keys / "b.pub")
    assert (code, "the signature is not valid" in text) == (1, True)
    with pytest.raises(InputError, match="not a public key"):
        check_integrity(out, public_key=keys / "a.pem")
    # Changed by someone who knows the manifest: hashes, card and seal agree, the signature does not.
    config = out / "config.json"
    config.write_text(config.read_text() + " ")
    sha = hashlib.sha256(config.read_bytes()).hexdigest()
    edit(out, lambda content: content["files"].update({"config.json": sha}), seal=True)
    check_integrity(out)
    code, text = verified(out, "--signature", "--public-key", keys / "a.pub")
    assert (code, "the signature is not valid" in text) == (1, True)


def test_a_signature_that_leaves_files_out_is_refused(out: Path, keys: Path) -> None:
    sign(out, keys / "a.pem", "--ignore-paths", str(out / SHARD))
    with pytest.raises(FileFormatError, match=f"does not cover 1 files, first {SHARD}"):
        check_integrity(out, public_key=keys / "a.pub")
    (out / "model.sig").write_text("{}")
    with pytest.raises(FileFormatError, match="the signature is not valid"):
        check_integrity(out, public_key=keys / "a.pub")


def test_a_base_s_signature_is_not_carried_into_what_is_merged_from_it(out: Path, keys: Path, tmp_path: Path) -> None:
    base, adapter = write_four_shards(tmp_path)
    (base / "model.sig").write_text("{}")
    merge(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged" / "model.sig").exists()


def test_without_the_package_the_way_out_is_told(out: Path, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sign(out, keys / "a.pem")
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(MissingDependencyError, match="\\[sign\\]"):
        check_integrity(out, public_key=keys / "a.pub")


def test_signature_options_go_together(out: Path, keys: Path) -> None:
    for wrong in (["--signature"], ["--public-key", str(keys / "a.pub")]):
        assert CliRunner().invoke(group, ["verify", str(out), *wrong]).exit_code == 2
    both = ["--signature", "--public-key", str(keys / "a.pub")]
    assert CliRunner().invoke(group, ["verify", str(out), str(out), str(out), *both]).exit_code == 2


# -- provenance ----------------------------------------------------------------------------------------------


def test_the_provenance_follows_the_published_schemas_and_names_every_file(out: Path, tmp_path: Path) -> None:
    """in-toto's own protobuf messages, which refuse unknown fields, and its validation."""
    from google.protobuf.json_format import ParseDict
    from in_toto_attestation.predicates.provenance.v1.provenance_pb2 import Provenance
    from in_toto_attestation.v1.statement import Statement
    from in_toto_attestation.v1.statement_pb2 import Statement as Message

    file = tmp_path / "provenance.json"
    assert CliRunner().invoke(group, ["attest", str(out), "-o", str(file), "-q"]).exit_code == 0
    statement = json.loads(file.read_text())
    Statement.copy_from_pb(ParseDict(statement, Message())).validate()
    predicate = ParseDict(statement["predicate"], Provenance())
    assert statement["predicateType"] == "https://slsa.dev/provenance/v1"
    named = {entry["name"]: entry["digest"]["sha256"] for entry in statement["subject"]}
    there = {path for path in out.rglob("*") if path.is_file()}
    assert named == {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in there}
    kinds = [entry.name.partition("/")[0] for entry in predicate.build_definition.resolved_dependencies]
    assert set(kinds) == {"base", "adapter"}
    assert predicate.build_definition.external_parameters["artefact"] == "merged model"
    assert predicate.run_details.metadata.finished_on.seconds > 0
    again = CliRunner().invoke(group, ["attest", str(out)])
    assert json.loads(again.stdout) == statement
    add_hidden(out)
    assert isinstance(CliRunner().invoke(group, ["attest", str(out)]).exception, FileFormatError)
    inside = CliRunner().invoke(group, ["attest", str(out), "-o", str(out / "provenance.json")])
    assert "whose files must not change" in str(inside.exception)
