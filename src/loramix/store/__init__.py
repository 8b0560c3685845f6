"""What outlives a restart: keys, conversations, workflow tasks and jobs, in one database.

    store = Store.open("sqlite:///loramix.db")        # or postgresql://host/name
    key, secret = store.keys.add("ada", adapters=["sql"])
    assert store.keys.find(secret) == key

Every method is one transaction and may be called from any thread; on an event loop through
`asyncio.to_thread`. What they return are values: nothing is written by changing one. All raise
StoreError while the database cannot be reached, and work again when it can.
"""

from __future__ import annotations

from typing import Self

from loramix.store.conversations import Conversations
from loramix.store.database import Database
from loramix.store.jobs import Jobs
from loramix.store.keys import Keys
from loramix.store.tasks import Tasks


class Store:
    """An open database, by what it holds."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.keys = Keys(database)
        self.conversations = Conversations(database)
        self.tasks = Tasks(database)
        self.jobs = Jobs(database)

    @classmethod
    def open(cls, url: str) -> Self:
        """Connect, and bring the tables to this version's form. StoreError if that fails."""
        database = Database(url)
        try:
            database.migrate()
        except BaseException:
            database.close()
            raise
        return cls(database)

    @property
    def is_shared(self) -> bool:
        """Whether other servers may be using the same database: PostgreSQL's, not a file."""
        return self._database.is_shared

    def close(self) -> None:
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __str__(self) -> str:
        """Its URL without the password."""
        return str(self._database)
