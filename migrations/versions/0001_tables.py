"""The tables: studies, files, readings, results, views, weights, labels, events."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "studies",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("study_uid", sa.String(), nullable=True),
        sa.Column("accession", sa.String(), nullable=True),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("source", sa.String(), nullable=False),
        sa.Column("received_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("work", sa.String(), nullable=False),
        sa.Column("request", sa.Integer(), nullable=False),
        sa.Column("not_before", sa.DateTime(timezone=True), nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("rerun", sa.Boolean(), nullable=False),
        sa.Column("set_area", sa.String(), nullable=True),
        sa.Column("set_all", sa.Boolean(), nullable=False),
        sa.Column("last_error", sa.String(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_studies"),
    )
    op.create_index("ix_studies_digest", "studies", ["digest"])
    op.create_index("ix_studies_kind_key", "studies", ["kind", "key"])
    op.create_index("ix_studies_study_uid", "studies", ["study_uid"])
    op.create_index(
        "ix_studies_work_rerun_received_at", "studies", ["work", "rerun", "received_at"]
    )
    op.create_table(
        "weights",
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("area", sa.String(), nullable=False),
        sa.Column("card", sa.JSON(), nullable=False),
        sa.Column("first_used", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("digest", "area", name="pk_weights"),
    )
    op.create_table(
        "events",
        sa.Column("id", ID, nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("study_id", sa.String(), nullable=True),
        sa.Column("what", sa.String(), nullable=False),
        sa.Column("detail", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["study_id"], ["studies.id"], name="fk_events_study_id"),
        sa.PrimaryKeyConstraint("id", name="pk_events"),
    )
    op.create_index("ix_events_study_id", "events", ["study_id"])
    op.create_table(
        "files",
        sa.Column("id", ID, nullable=False),
        sa.Column("study_id", sa.String(), nullable=False),
        sa.Column("claim", sa.String(), nullable=False),
        sa.Column("raw_name", sa.LargeBinary(), nullable=False),
        sa.Column("source", sa.String(), nullable=False),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("mtime_ns", sa.String(), nullable=False),
        sa.Column("inode", sa.String(), nullable=False),
        sa.Column("place", sa.String(), nullable=False),
        sa.Column("problem", sa.String(), nullable=False),
        sa.Column("received_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["study_id"], ["studies.id"], name="fk_files_study_id"),
        sa.PrimaryKeyConstraint("id", name="pk_files"),
        sa.UniqueConstraint("claim", "raw_name", name="uq_files_claim_raw_name"),
    )
    op.create_index("ix_files_place", "files", ["place"])
    op.create_index("ix_files_study_id", "files", ["study_id"])
    op.create_table(
        "labels",
        sa.Column("study_id", sa.String(), nullable=False),
        sa.Column("area", sa.String(), nullable=False),
        sa.Column("label", sa.String(), nullable=False),
        sa.Column("by", sa.String(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["study_id"], ["studies.id"], name="fk_labels_study_id"),
        sa.PrimaryKeyConstraint("study_id", "area", name="pk_labels"),
    )
    op.create_table(
        "results",
        sa.Column("id", ID, nullable=False),
        sa.Column("study_id", sa.String(), nullable=False),
        sa.Column("area", sa.String(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("supersedes", ID, nullable=True),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("weights", sa.String(), nullable=False),
        sa.Column("run", sa.Integer(), nullable=False),
        sa.Column("logit", sa.Float(), nullable=False),
        sa.Column("probability", sa.Float(), nullable=False),
        sa.Column("calibrated", sa.Float(), nullable=True),
        sa.Column("decision", sa.String(), nullable=False),
        sa.Column("threshold", sa.Float(), nullable=False),
        sa.Column("operating_point", sa.String(), nullable=False),
        sa.Column("aggregate", sa.String(), nullable=False),
        sa.Column("target", sa.String(), nullable=False),
        sa.Column("preprocessing", sa.JSON(), nullable=False),
        sa.Column("calibration", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("views", sa.Integer(), nullable=False),
        sa.Column("views_failed", sa.Integer(), nullable=False),
        sa.Column("area_source", sa.String(), nullable=True),
        sa.Column("evidence", sa.JSON(), nullable=False),
        sa.Column("runtime", sa.String(), nullable=False),
        sa.Column("version", sa.String(), nullable=False),
        sa.Column("scored_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["study_id"], ["studies.id"], name="fk_results_study_id"),
        sa.ForeignKeyConstraint(["supersedes"], ["results.id"], name="fk_results_supersedes"),
        sa.ForeignKeyConstraint(
            ["weights", "area"], ["weights.digest", "weights.area"], name="fk_results_weights_area"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_results"),
        sa.UniqueConstraint(
            "digest", "area", "weights", "run", name="uq_results_digest_area_weights_run"
        ),
        sa.UniqueConstraint(
            "study_id", "area", "revision", name="uq_results_study_id_area_revision"
        ),
    )
    op.create_index("ix_results_scored_at", "results", ["scored_at"])
    op.create_index("ix_results_supersedes", "results", ["supersedes"])
    op.create_table(
        "readings",
        sa.Column("id", ID, nullable=False),
        sa.Column("study_id", sa.String(), nullable=False),
        sa.Column("area", sa.String(), nullable=False),
        sa.Column("received_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("reason_code", sa.String(), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("area_source", sa.String(), nullable=True),
        sa.Column("evidence", sa.JSON(), nullable=False),
        sa.Column("result_id", ID, nullable=True),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["result_id"], ["results.id"], name="fk_readings_result_id"),
        sa.ForeignKeyConstraint(["study_id"], ["studies.id"], name="fk_readings_study_id"),
        sa.PrimaryKeyConstraint("id", name="pk_readings"),
        sa.UniqueConstraint("study_id", "area", name="uq_readings_study_id_area"),
    )
    op.create_index(
        "ix_readings_received_at_study_id_area", "readings", ["received_at", "study_id", "area"]
    )
    op.create_index("ix_readings_result_id", "readings", ["result_id"])
    op.create_index("ix_readings_state_area", "readings", ["state", "area"])
    op.create_table(
        "views",
        sa.Column("id", ID, nullable=False),
        sa.Column("result_id", ID, nullable=False),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("frame", sa.Integer(), nullable=False),
        sa.Column("source", sa.String(), nullable=False),
        sa.Column("sop_instance_uid", sa.String(), nullable=True),
        sa.Column("logit", sa.Float(), nullable=True),
        sa.Column("probability", sa.Float(), nullable=True),
        sa.Column("overlay", sa.String(), nullable=True),
        sa.Column("error_code", sa.String(), nullable=False),
        sa.Column("error", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["result_id"], ["results.id"], name="fk_views_result_id"),
        sa.PrimaryKeyConstraint("id", name="pk_views"),
    )
    op.create_index("ix_views_result_id", "views", ["result_id"])
