"""Readings hold what rows are chosen by, and indexes hold it in the order of the rows.

A million results take some twenty seconds, and a tenth more room.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

ROWS = ["received_at", "study_id", sa.text("area DESC")]


def upgrade() -> None:
    op.drop_index("ix_results_supersedes", "results")
    op.drop_index("ix_readings_received_at_study_id_area", "readings")
    op.drop_index("ix_readings_state_area", "readings")
    op.drop_index("ix_views_result_id", "views")
    op.add_column("readings", sa.Column("decision", sa.String(), nullable=True))
    op.add_column("readings", sa.Column("probability", sa.Float(), nullable=True))
    op.add_column("readings", sa.Column("weights", sa.String(), nullable=True))
    op.execute(
        "UPDATE readings SET (decision, probability, weights) ="
        " (SELECT decision, probability, weights FROM results WHERE results.id = result_id)"
        " WHERE result_id IS NOT NULL"
    )
    chosen_by = ["state", "reason_code", "decision", "probability", "result_id"]
    op.create_index("ix_readings_rows", "readings", [*ROWS, *chosen_by])
    for name, columns, where in (
        ("ix_readings_not_done", [*ROWS, "state"], "state <> 'done'"),
        ("ix_readings_weights", ["weights", *ROWS], "weights IS NOT NULL"),
    ):
        only = {f"{dialect}_where": sa.text(where) for dialect in ("sqlite", "postgresql")}
        op.create_index(name, "readings", columns, **only)
    of_view = ["result_id", "probability", "error_code"]
    op.create_index("ix_views_result_id_probability_error_code", "views", of_view)
