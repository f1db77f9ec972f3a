"""What is for sale at an escrow: signed manifests, and the sealed weights that they mean."""

import json
from functools import lru_cache

from paris_ray.artifacts import sha256_hex
from paris_ray.documents import printable
from paris_ray.errors import ParisError, TradeError
from paris_ray.signatures import SignedDocument
from paris_ray.zklora.journal import Journal
from paris_ray.zklora.manifest import AdapterManifest
from paris_ray.zklora.sealing import check_opening
from paris_ray.zklora.trade import MAX_REASON

MAX_LISTED = 1000  # adapters of one seller
MAX_LISTED_BYTES = 2**34  # of their sealed weights
MANIFESTS_KEPT = 16  # in memory, parsed: each may have some MB
PIECE_BYTES = 2**21  # sealed weights come and go in pieces, so that nobody holds much memory

LISTING_TABLES = (
    "CREATE TABLE adapters (adapter_id TEXT PRIMARY KEY, seller TEXT NOT NULL,"
    " manifest TEXT NOT NULL, sealed_bytes INTEGER NOT NULL) STRICT",
    "CREATE INDEX adapters_by_seller ON adapters (seller)",
    "CREATE TABLE pieces (adapter_id TEXT REFERENCES adapters, number INTEGER,"
    " content BLOB NOT NULL, PRIMARY KEY (adapter_id, number)) STRICT",
)


class Listings:
    """The adapters that sellers have listed.

    A manifest comes first, and its size counts from then on, whether or not the weights ever come:
    no byte of them is taken that was not announced and allowed.

    Args:
        journal: The escrow's, with the tables LISTING_TABLES.
        certificate: That of the escrow, as manifests must name it.
    """

    def __init__(self, journal: Journal, certificate: str) -> None:
        self._journal, self._certificate = journal, certificate
        self.manifest = lru_cache(MANIFESTS_KEPT)(self._read_manifest)

    def add(self, caller: str, manifest: SignedDocument) -> int:
        """List an adapter; return the number of the first piece of its weights that is not here.

        Raises:
            TradeError: if the caller is not the contributor or has listed too much, or the manifest
                names another escrow.
            ParisError: if the manifest is malformed or not signed by its contributor.
        """
        terms = AdapterManifest.from_signed(manifest)
        if terms.contributor != caller:
            raise TradeError(f"an adapter is listed by its contributor, {terms.contributor}")
        if terms.escrow_certificate != self._certificate:
            raise TradeError("the manifest's escrow_certificate is not that of this escrow")
        adapter_id, size = terms.adapter_id, terms.sealed_bytes
        with self._journal.transaction():
            if not self._journal.first("SELECT 1 FROM adapters WHERE adapter_id = ?", adapter_id):
                self._check_may_list(caller, size)
                document = json.dumps(terms.to_json())
                insert = "INSERT INTO adapters VALUES (?, ?, ?, ?)"
                self._journal.execute(insert, adapter_id, caller, document, size)
            return self._num_pieces(adapter_id)

    def _check_may_list(self, seller: str, size: int) -> None:
        query = "SELECT count(*), coalesce(sum(sealed_bytes), 0) FROM adapters WHERE seller = ?"
        listed, listed_bytes = self._journal.first(query, seller)
        if listed >= MAX_LISTED or listed_bytes + size > MAX_LISTED_BYTES:
            raise TradeError(
                f"{listed} adapters of {seller} are listed, with {listed_bytes} bytes: at most "
                f"{MAX_LISTED} with {MAX_LISTED_BYTES} are allowed"
            )

    def upload(self, caller: str, adapter_id: str, number: int, piece: bytes) -> None:
        """Take the next piece of the sealed weights of a listed adapter.

        Raises:
            TradeError: if the adapter is not the caller's, it is not the next piece or has another
                size than PIECE_BYTES or what is left, or if all of them are not the weights that
                the manifest means, which are then forgotten.
        """
        manifest = self.manifest(adapter_id)
        if manifest.contributor != caller:
            raise TradeError(f"the weights come from their contributor, {manifest.contributor}")
        digest = manifest.sealed_digest
        size = min(PIECE_BYTES, manifest.sealed_bytes - number * PIECE_BYTES)
        with self._journal.transaction():
            expected = self._num_pieces(adapter_id)
            if number != expected or len(piece) != size:
                raise TradeError(
                    f"piece {number} with {len(piece)} bytes is not allowed: {expected} is next, "
                    f"and all pieces have {manifest.sealed_bytes} bytes, {PIECE_BYTES} each"
                )
            insert = "INSERT INTO pieces VALUES (?, ?, ?)"
            self._journal.execute(insert, adapter_id, number, piece)
            hold = self.missing(manifest) or sha256_hex(self.sealed(adapter_id)) == digest
            if not hold:
                self._journal.execute("DELETE FROM pieces WHERE adapter_id = ?", adapter_id)
        if not hold:
            raise TradeError("the sealed bytes are not those of the manifest's sealed_digest")

    def missing(self, manifest: AdapterManifest) -> int:
        """Return how many pieces of the weights have not come yet."""
        return -(-manifest.sealed_bytes // PIECE_BYTES) - self._num_pieces(manifest.adapter_id)

    def piece(self, adapter_id: str, number: int) -> bytes:
        """Return a piece of the sealed weights; raises TradeError if there is none such."""
        query = "SELECT content FROM pieces WHERE adapter_id = ? AND number = ?"
        if (piece := self._journal.first(query, adapter_id, number)) is None:
            raise TradeError(f"piece={number} is not allowed: the weights have no such piece")
        return bytes(piece[0])

    def sealed(self, adapter_id: str) -> bytes:
        """Return the sealed weights, as far as they are here."""
        query = "SELECT content FROM pieces WHERE adapter_id = ? ORDER BY number"
        return b"".join(content for (content,) in self._journal.execute(query, adapter_id))

    def opening_fault(self, adapter_id: str, key: bytes) -> str | None:
        """Return why a key does not open what was committed, if so.

        It takes about a second for a large adapter.
        """
        try:
            check_opening(self.manifest(adapter_id), self.sealed(adapter_id), key)
        except ParisError as error:
            return printable(str(error), MAX_REASON)
        return None

    def _num_pieces(self, adapter_id: str) -> int:
        query = "SELECT count(*) FROM pieces WHERE adapter_id = ?"
        return int(self._journal.first(query, adapter_id)[0])

    def _read_manifest(self, adapter_id: str) -> AdapterManifest:
        """Return a manifest whose signature and points were checked when it was listed."""
        found = self._journal.first(
            "SELECT manifest FROM adapters WHERE adapter_id = ?", adapter_id
        )
        if found is None:
            raise TradeError(f"no adapter {adapter_id} is listed")
        return AdapterManifest.from_json(json.loads(found[0]))
