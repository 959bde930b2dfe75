//! A command that is killed at any moment leaves what the next one repairs.

use std::process::Stdio;
use std::thread;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};

use crate::look::{expect_bare, expect_no_state, expect_ours};
use crate::world::World;

const ROUNDS: u32 = 40;
const LONGEST: Duration = Duration::from_millis(150);

/// Numbers that look random and can be had again: NETOKEN_SEED.
struct Dice(u64);

impl Dice {
    fn new(who: &str) -> Result<Dice> {
        let seed = match std::env::var("NETOKEN_SEED") {
            Ok(text) => text.parse().context("NETOKEN_SEED is a number")?,
            Err(_) => SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_micros() as u64,
        };
        println!("crash::{who}: NETOKEN_SEED={seed}");
        Ok(Dice(seed))
    }

    /// SplitMix64.
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn delay(&mut self) -> Duration {
        Duration::from_micros(self.roll() % LONGEST.as_micros() as u64)
    }
}

/// Starts a command and kills it that much later, if it still runs.
fn kill_after(world: &World, args: &str, delay: Duration) -> Result<()> {
    let mut command = world.lab.netoken(&world.args(args));
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    // The moment is what this is about; nothing is waited for.
    thread::sleep(delay);
    child.kill()?;
    child.wait()?;
    Ok(())
}

fn each_round(who: &str, mut round: impl FnMut(&World, Duration) -> Result<()>) -> Result<()> {
    let mut dice = Dice::new(who)?;
    let world = World::new()?;
    for number in 0..ROUNDS {
        let delay = dice.delay();
        round(&world, delay).with_context(|| format!("round {number}, killed after {delay:?}"))?;
    }
    Ok(())
}

fn expect_destroyed(world: &World) -> Result<()> {
    world.ok("-i c0 --destroy")?;
    expect_bare(&world.ns, "c0")?;
    expect_no_state(&world.lab)
}

pub fn a_killed_attach_is_repaired_by_the_next() -> Result<()> {
    let mut odd = false;
    each_round("a_killed_attach_is_repaired_by_the_next", |world, delay| {
        kill_after(world, "-i c0 --attach --quiet --priority 9", delay)?;
        // By an attach, or by a destroy alone.
        odd = !odd;
        if odd {
            world.ok("-i c0 --attach --quiet")?;
            expect_ours(&world.ns, "c0", 1)?;
        }
        expect_destroyed(world)
    })
}

pub fn a_killed_replacement_is_repaired_by_the_next() -> Result<()> {
    let mut priority = 10;
    each_round("a_killed_replacement_is_repaired_by_the_next", |world, delay| {
        world.ok("-i c0 --attach --quiet")?;
        // To another place, which takes two steps.
        priority += 1;
        kill_after(world, &format!("-i c0 --attach --quiet --priority {priority}"), delay)?;
        world.ok("-i c0 --attach --quiet")?;
        expect_ours(&world.ns, "c0", 1)?;
        if priority % 10 == 0 { expect_destroyed(world) } else { Ok(()) }
    })
}

pub fn a_killed_destroy_is_finished_by_the_next() -> Result<()> {
    each_round("a_killed_destroy_is_finished_by_the_next", |world, delay| {
        world.ok("-i c0 --attach --quiet")?;
        expect_ours(&world.ns, "c0", 1)?;
        kill_after(world, "-i c0 --destroy", delay)?;
        expect_destroyed(world)
    })
}
