"""Alembic's entry: runs on the connection that ``mura_batch.database`` opened.

The whole upgrade is the one transaction of that connection (DDL included, on SQLite too), so a
kill leaves the old revision or the new one.
"""

from alembic import context

from mura_batch.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
