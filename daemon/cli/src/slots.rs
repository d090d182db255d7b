//! `blocklora slots`: who owns which rows.

use std::collections::BTreeMap;

use blocklora_client::{Partition, Slot};

use crate::daemon::{self, State};
use crate::output;
use crate::table::Table;

/// Show which adapters and leases own which slots of a partition
///
/// Adapters in different slots of one partition never change the same weight. A training leases its slot until it is
/// over; other leases can be given back.
#[derive(clap::Args)]
pub struct Args {
    /// Only of the model with this digest
    #[arg(long, value_name = "DIGEST")]
    base_digest: Option<String>,
    /// Only of this partition: contiguous, strided or permuted
    #[arg(long, value_name = "SCHEME")]
    scheme: Option<String>,
    /// Slots of that partition
    #[arg(long, value_name = "N", default_value_t = 16, requires = "scheme")]
    capacity: u32,
    /// Seed of that partition, if it is permuted
    #[arg(long, value_name = "N", default_value_t = 0, requires = "scheme")]
    partition_seed: u64,
    /// Give this lease back, by the id that the map shows
    #[arg(long, value_name = "LEASE", conflicts_with_all = ["base_digest", "scheme"])]
    release: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: &Args, options: &daemon::Options) -> anyhow::Result<()> {
    if let Some(lease) = &args.release {
        daemon::run(async {
            let daemon = daemon::connect(options, State::User).await?;
            daemon.client.release_slot(lease).await?;
            daemon.close().await;
            Ok(())
        })?;
        return match args.json {
            true => output::print_json(&serde_json::json!({ "released": lease })),
            false => Ok(output::print(&format!("{lease}: given back\n"))?),
        };
    }
    let partition = args.scheme.as_ref().map(|scheme| Partition {
        scheme: scheme.clone(),
        capacity: args.capacity,
        seed: args.partition_seed,
    });
    let slots = daemon::run(async {
        let daemon = daemon::connect(options, State::User).await?;
        let slots = daemon.client.slots(args.base_digest.as_deref(), partition.as_ref()).await?;
        daemon.close().await;
        Ok(slots)
    })?;
    if args.json {
        return output::print_json(&slots);
    }
    Ok(output::print(&describe(&slots))?)
}

/// A map of every partition: one line for each slot, free ones too.
fn describe(slots: &[Slot]) -> String {
    let mut partitions: BTreeMap<(&str, &str, u32, u64), Vec<&Slot>> = BTreeMap::new();
    for slot in slots {
        let key = (slot.base_digest.as_str(), slot.scheme.as_str(), slot.capacity, slot.partition_seed);
        partitions.entry(key).or_default().push(slot);
    }
    if partitions.is_empty() {
        return "no slot is owned or leased\n".to_owned();
    }
    let mut text = String::new();
    for ((base, scheme, capacity, seed), slots) in partitions {
        let seed = if scheme == "permuted" { format!(", seed {seed}") } else { String::new() };
        text += &format!("base {:.12}, {scheme}, {capacity} slots{seed}\n", base);
        let mut table = Table::new(["  slot", "rows", "holder"]);
        for number in 0..capacity {
            let holders: Vec<String> = slots.iter().filter(|s| s.slot == number).map(|s| holder(s)).collect();
            let rows = format!("{:.1} %", 100.0 / f64::from(capacity));
            let clash = if holders.len() > 1 { "  (clash)" } else { "" };
            let who = if holders.is_empty() { "-".to_owned() } else { holders.join(", ") + clash };
            table.row([format!("  {number}"), rows, who]);
        }
        text += &format!("{table}\n");
    }
    text
}

fn holder(slot: &Slot) -> String {
    match slot.holder.as_str() {
        "lease" => format!("leased for {:?} ({})", slot.name, slot.lease),
        _ => format!("{} {:.12}", slot.name, slot.digest),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(number: u32, holder: &str, name: &str) -> Slot {
        Slot {
            base_digest: "ab".repeat(32),
            scheme: "contiguous".into(),
            capacity: 3,
            partition_seed: 0,
            slot: number,
            holder: holder.into(),
            name: name.into(),
            digest: "cd".repeat(32),
            lease: "l1".into(),
            uid: 0,
            expires_usec: 0,
        }
    }

    #[test]
    fn every_slot_has_a_line() {
        let text = describe(&[slot(0, "adapter", "milo"), slot(0, "adapter", "rival"), slot(2, "lease", "zuko")]);
        assert!(text.starts_with("base abababababab, contiguous, 3 slots\n"), "{text}");
        let line = |n: usize| text.lines().nth(n + 2).unwrap_or_default();
        assert!(line(0).contains("milo cdcdcdcdcdcd, rival") && line(0).contains("(clash)"), "{text}");
        assert!(line(1).ends_with('-') && line(2).contains("leased for \"zuko\""), "{text}");
        assert_eq!(describe(&[]), "no slot is owned or leased\n");
    }
}
