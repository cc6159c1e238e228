//! A stream as a row.

use rusqlite::{Statement, named_params};

use super::{Finished, Settings};
use crate::{
    config::ReportEvent,
    domain::{Outcome, StreamId},
    journal::{Orphan, Over, StreamName, file_name},
    ledger::Settled,
};

/// What is there already stays: a crash has it written twice. The streams that a track had before are
/// counted as they come.
pub(super) const INSERT: &str = "
    INSERT OR IGNORE INTO streams (
        receipt, daemon, run, id, room, participant, track, provider, model, language, encoding,
        request_id, opened_at_ms, settled_at_ms, wall_seconds, close_seconds, connection_seconds,
        audio_seconds, provider_seconds, audio_bytes, reconnects, outcome, cause, reason, cost,
        currency, due
    ) VALUES (
        :receipt, :daemon, :run, :id, :room, :participant, :track, :provider, :model, :language,
        :encoding, :request_id, :opened_at_ms, :settled_at_ms, :wall_seconds, :close_seconds,
        :connection_seconds, :audio_seconds, :provider_seconds, :audio_bytes,
        (SELECT count(*) FROM streams AS earlier WHERE earlier.track = :track
            AND earlier.room = :room AND earlier.participant = :participant),
        :outcome, :cause, :reason, :cost, :currency, :due
    )";

pub(super) fn insert(
    statement: &mut Statement<'_>,
    over: &Over,
    settings: &Settings,
) -> rusqlite::Result<()> {
    match over {
        Over::Settled(run, settled) => insert_settled(statement, *run, settled, settings),
        Over::Orphaned(orphan) => insert_orphan(statement, orphan, settings),
    }
}

/// Names a stream for ever, in ASCII.
pub fn receipt(daemon: &str, (run, StreamId(id)): StreamName) -> String {
    format!("{}/{run}/{id}", file_name(daemon))
}

fn insert_settled(
    statement: &mut Statement<'_>,
    run: u64,
    settled: &Settled,
    settings: &Settings,
) -> rusqlite::Result<()> {
    let Settled {
        id,
        key,
        service,
        outcome,
        reason,
        totals,
        opened_at_ms,
        settled_at_ms,
        wall_seconds,
        connection_seconds,
        close_seconds,
    } = settled;
    let Settings { daemon, prices, .. } = settings;
    let audio_seconds = totals.audio_seconds;
    let cost = prices.cost(&service.model, audio_seconds, *connection_seconds);
    let cause = match outcome {
        Outcome::Acknowledged => None,
        other => Some(other.to_string()),
    };
    statement.execute(named_params! {
        ":receipt": receipt(daemon, (run, *id)),
        ":daemon": daemon,
        ":run": run,
        ":id": id.0,
        ":room": key.room,
        ":participant": key.participant,
        ":track": key.track,
        ":provider": service.provider,
        ":model": service.model,
        ":language": service.language,
        ":encoding": service.encoding,
        ":request_id": totals.request_id,
        ":opened_at_ms": *opened_at_ms,
        ":settled_at_ms": *settled_at_ms,
        ":wall_seconds": wall_seconds,
        ":close_seconds": close_seconds,
        ":connection_seconds": connection_seconds,
        ":audio_seconds": audio_seconds,
        ":provider_seconds": totals.provider_seconds,
        ":audio_bytes": totals.audio_bytes,
        ":outcome": outcome.name(),
        ":cause": cause,
        ":reason": reason.to_string(),
        ":cost": cost,
        ":currency": cost.map(|_| &prices.currency),
        ":due": settings.reports(ReportEvent::StreamSettled),
    })?;
    Ok(())
}

pub(super) const INSERT_FINISHED: &str = "
    INSERT INTO finished (
        daemon, run, room, room_sid, participant, begun_at_ms, ended_at_ms, reason, last
    ) VALUES (
        :daemon, :run, :room, :room_sid, :participant, :begun_at_ms, :ended_at_ms, :reason,
        (SELECT coalesce(max(seq), 0) FROM streams)
    )";

pub(super) fn insert_finished(
    statement: &mut Statement<'_>,
    run: u64,
    finished: &Finished,
    settings: &Settings,
) -> rusqlite::Result<()> {
    statement.execute(named_params! {
        ":daemon": settings.daemon,
        ":run": run,
        ":room": finished.room,
        ":room_sid": finished.room_sid,
        ":participant": finished.participant,
        ":begun_at_ms": finished.begun_at_ms,
        ":ended_at_ms": finished.ended_at_ms,
        ":reason": finished.reason,
    })?;
    Ok(())
}

/// What went over it is not known.
fn insert_orphan(
    statement: &mut Statement<'_>,
    orphan: &Orphan,
    settings: &Settings,
) -> rusqlite::Result<()> {
    let Orphan {
        run,
        stream,
        free_by_ms,
    } = orphan;
    let (key, service) = (&stream.key, &stream.service);
    let cause = format!(
        "the daemon was killed; the stream was {}",
        stream.state.name()
    );
    statement.execute(named_params! {
        ":receipt": receipt(&settings.daemon, (*run, stream.id)),
        ":daemon": settings.daemon,
        ":run": run,
        ":id": stream.id.0,
        ":room": key.room,
        ":participant": key.participant,
        ":track": key.track,
        ":provider": service.provider,
        ":model": service.model,
        ":language": service.language,
        ":encoding": service.encoding,
        ":request_id": stream.request_id,
        ":opened_at_ms": stream.opened_at_ms,
        ":settled_at_ms": *free_by_ms,
        ":wall_seconds": None::<f64>,
        ":close_seconds": None::<f64>,
        ":connection_seconds": None::<f64>,
        ":audio_seconds": None::<f64>,
        ":provider_seconds": None::<f64>,
        ":audio_bytes": None::<i64>,
        ":outcome": "orphaned",
        ":cause": cause,
        ":reason": "daemon killed",
        ":cost": None::<f64>,
        ":currency": None::<&str>,
        ":due": settings.reports(ReportEvent::StreamSettled),
    })?;
    Ok(())
}
