//! A command that is killed at any moment leaves what the next one repairs.

use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use crate::lab::wait_until;
use crate::look::{expect_bare, expect_no_state, expect_ours};
use crate::world::World;

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

    /// A moment in the life of something that takes that long, or shortly after it.
    fn moment(&mut self, whole: Duration) -> Duration {
        whole.mul_f64((self.roll() % 1250) as f64 / 1000.0)
    }
}

/// Kills commands at random moments. How long one takes is measured first, and whenever a kill came too late: of a machine
/// that stood still meanwhile the shortest time says it best.
struct Killer {
    dice: Dice,
    whole: Option<Duration>,
    /// Kills that hit a command which still ran, and all of them.
    hit: u32,
    kills: u32,
}

impl Killer {
    fn kill(&mut self, world: &World, args: &str) -> Result<String> {
        let start = Instant::now();
        let mut command = world.lab.netoken(&world.args(args));
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let Some(whole) = self.whole else {
            wait_until("the command to end", || Ok(child.try_wait()?))?;
            self.whole = Some(start.elapsed());
            return Ok("not killed".to_string());
        };
        let moment = self.dice.moment(whole);
        // The moment is what this is about; nothing is waited for.
        thread::sleep(moment);
        let late = start.elapsed();
        child.kill()?;
        self.kills += 1;
        if child.wait()?.signal() == Some(Signal::SIGKILL as i32) {
            self.hit += 1;
        } else {
            self.whole = Some(whole.min(late));
        }
        Ok(format!("killed after {moment:?} of {whole:?}"))
    }

    /// Or else the case would show nothing.
    fn expect_hits(&self) -> Result<()> {
        ensure!(self.hit * 4 >= self.kills, "{} of {} kills hit a command that ran", self.hit, self.kills);
        Ok(())
    }
}

/// Each round kills a command and then looks whether that is repaired.
fn rounds(
    count: u32,
    who: &str,
    mut kill: impl FnMut(&World, &mut Killer) -> Result<String>,
    mut repair: impl FnMut(&World, u32) -> Result<()>,
) -> Result<()> {
    let mut killer = Killer { dice: Dice::new(who)?, whole: None, hit: 0, kills: 0 };
    let world = World::new()?;
    for number in 0..count {
        let how = kill(&world, &mut killer)?;
        repair(&world, number).with_context(|| format!("round {number}, {how}"))?;
    }
    killer.expect_hits()
}

fn expect_destroyed(world: &World) -> Result<()> {
    world.ok("-i c0 --destroy")?;
    expect_bare(&world.ns, "c0")?;
    expect_no_state(&world.lab)
}

pub fn a_killed_attach_is_repaired_by_the_next() -> Result<()> {
    let kill = |world: &World, killer: &mut Killer| killer.kill(world, "-i c0 --attach --quiet --priority 9");
    rounds(40, "a_killed_attach_is_repaired_by_the_next", kill, |world, number| {
        // By an attach, or by a destroy alone.
        if number % 2 == 0 {
            world.ok("-i c0 --attach --quiet")?;
            expect_ours(&world.ns, "c0", 1)?;
        }
        expect_destroyed(world)
    })
}

pub fn a_killed_replacement_is_repaired_by_the_next() -> Result<()> {
    let mut priority = 10;
    let kill = |world: &World, killer: &mut Killer| {
        world.ok("-i c0 --attach --quiet")?;
        // To another place, which takes two steps.
        priority += 1;
        killer.kill(world, &format!("-i c0 --attach --quiet --priority {priority}"))
    };
    rounds(30, "a_killed_replacement_is_repaired_by_the_next", kill, |world, number| {
        world.ok("-i c0 --attach --quiet")?;
        expect_ours(&world.ns, "c0", 1)?;
        if number % 10 == 9 { expect_destroyed(world) } else { Ok(()) }
    })
}

pub fn a_killed_destroy_is_finished_by_the_next() -> Result<()> {
    let kill = |world: &World, killer: &mut Killer| {
        world.ok("-i c0 --attach --quiet")?;
        expect_ours(&world.ns, "c0", 1)?;
        killer.kill(world, "-i c0 --destroy")
    };
    rounds(30, "a_killed_destroy_is_finished_by_the_next", kill, |world, _| expect_destroyed(world))
}
