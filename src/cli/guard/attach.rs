//! `netoken guard --attach`: puts the guard on interfaces, all of them or none.

use std::collections::{BTreeSet, HashSet};
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use anyhow::{Context, Result, bail};

use super::rules::{NO_MARKS, load_keys, set_rules};
use super::{GuardArgs, HookArg, PASSED_BY, RISK, Record, SEES_IT, TO_THE_FRONT, hook_name};
use crate::cli::args::Scope;
use crate::cli::loads::Loads;
use crate::cli::signals::Signals;
use crate::cli::told::{Before, Said, filters_remark, keyless_note, lost_note, slots_note};
use crate::clock::{self, slots};
use crate::events::columns::Patient;
use crate::guard::program::{GuardMaps, GuardProgram, Kind, Settings};
use crate::guard::rules::Rules;
use crate::guard::running::{self, Running};
use crate::hooks::clsact::{Attachment, Hooks, Place, Taken, attached};
use crate::hooks::link::guarded_header;
use crate::hooks::loaded::{Loaded, Role, loaded_programs};
use crate::hooks::netlink::{Link, Netlink, Side};
use crate::hooks::tcx;
use crate::hooks::unused::remove_unused_pins;
use crate::hooks::xdp::{
    Allowed, Mode, XdpAttachment, at_xdp, attach_xdp, attached_xdp, put_back_xdp, take_xdp, undo_xdp,
};
use crate::keys::RingName;
use crate::keys::file::HeldKeys;
use crate::netns::Netns;
use crate::pins::Renewal;
use crate::privileges;
use crate::program::{LinkHeader, Program};
use crate::realtime;
use crate::rings;
use crate::state::{Instance, Lock, Remembered, State};
use crate::token::keyed::Slots;

const MARKS: &str = "the rules mark, which needs an skb";

/// What was done on one interface.
enum Done {
    /// With the reason why it is not XDP, if that was tried, and what was there.
    Tc(Attachment, Option<String>, Option<(Mode, OwnedFd)>),
    /// By this program, with what was at TC.
    Xdp(OwnedFd, XdpAttachment, Taken),
}

struct Job<'a> {
    args: &'a GuardArgs,
    state: &'a State,
    instance: &'a Instance,
    /// It had no pins before.
    is_new: bool,
    /// Until all is done: what a rotation gave to maps that an attach takes back would be lost with them.
    keys: Option<HeldKeys>,
    renewal: Option<Renewal>,
    /// The number of the rules that were remembered last, if the maps had none.
    restored: Option<Option<u64>>,
    done: Vec<(Link, Done)>,
    /// Rules run that those of the command line are to replace.
    replaces_rules: bool,
    /// The rules and slots that others were put into the place of before all was done, as far as there were any.
    before: Option<(Option<Running>, Option<Slots>)>,
    /// Key rings that the rules name and that have no key.
    keyless: BTreeSet<RingName>,
    /// What to say at the end.
    notes: Vec<String>,
}

pub(super) fn attach(args: &GuardArgs, scope: &Scope, rules: Option<&Rules>) -> Result<()> {
    let doing = format!("attaching the guard to {}", scope.ifaces.join(", "));
    privileges::check(&doing)?;
    realtime::check(&doing)?;
    let links = scope.find(&Netlink::connect()?.links()?)?;
    for link in &links {
        guarded_header(link)?;
    }

    let (state, lock) = State::create()?;
    let instance = state.instance(&scope.instance);
    let is_new = !instance.pins.exists();
    let mut job = Job {
        args,
        state: &state,
        instance: &instance,
        is_new,
        keys: None,
        renewal: None,
        restored: None,
        done: Vec::new(),
        replaces_rules: false,
        before: None,
        keyless: BTreeSet::new(),
        notes: Vec::new(),
    };
    let attached = (|| {
        job.keys = load_keys(&doing, &scope.instance, rules, None)?;
        let signals = Signals::catch(false)?;
        job.attach_all(&lock, &links, rules, &signals)?;
        Ok(signals)
    })();
    let signals = match attached {
        Ok(signals) => signals,
        Err(error) => {
            job.undo(&lock);
            if is_new {
                remove_unused_pins(&state, &lock, &instance.name).ok();
            }
            state.remove_if_empty(lock).ok();
            return Err(error);
        }
    };
    let taken_over = job.renewal.take().and_then(Renewal::finish);
    // Who listens may take their time, and nobody else has to wait for that.
    drop((job.keys.take(), lock));
    if let Some(taken_over) = taken_over {
        note!("instance '{}': {taken_over}", instance.name);
    }
    let mut out = Patient::stdout(Arc::clone(&signals.stop)).context("preparing standard output")?;
    job.tell(scope, &mut out).context("writing to standard output")
}

impl Job<'_> {
    fn attach_all(
        &mut self,
        lock: &Lock,
        links: &[Link],
        rules: Option<&Rules>,
        signals: &Signals,
    ) -> Result<()> {
        let marks = rules.map_or_else(|| running::marks(self.instance), |rules| Ok(rules.marks()))?;
        if self.args.hook == HookArg::Xdp && marks {
            bail!("attaching the guard: {NO_MARKS}");
        }
        self.instance.create()?;
        let mut wanted = Program::wanted_maps()?;
        wanted.extend(GuardProgram::wanted_maps()?);
        self.renewal = Some(self.instance.renew(wanted)?);
        // So that every command finds an instance whole, whichever side was attached first.
        Program::make_maps(&self.instance.pins)?;
        if marks {
            self.expect_no_xdp_beside(links)?;
        }
        let netns_ino = Netns::current()?.inode();
        let mut ready = false;
        let mut loads = Loads::new();
        for link in links {
            let ours = self.running(link)?;
            let lost = ours.iter().filter(|loaded| loaded.instance.is_none()).count();
            let before = Before::of(ours.into_iter().next());
            let said =
                Said { option_kind: self.args.option_kind, exid: self.args.exid, sample: self.args.sample };
            let told = said.over(&before);
            let (candidates, why) = self.candidates(link)?;
            let mut why = why.map(|why| if marks { MARKS } else { why }.to_string());
            for kind in candidates {
                if kind == Kind::Xdp && marks {
                    why = Some(MARKS.to_string());
                    continue;
                }
                let settings = Settings {
                    kind,
                    sample: told.sample,
                    netns_ino,
                    option_kind: told.option_kind,
                    exid: told.exid,
                    faults: 0,
                };
                let pins = &self.instance.pins;
                let program = loads.get(settings, |settings| GuardProgram::load(settings, Some(pins)))?;
                if !ready {
                    self.prepare(&program.maps, rules, lost > 0)?;
                    ready = true;
                }
                // Behind what takes time.
                signals.go_on(&format!("attaching the guard to {}", link.name))?;
                match self.attach_one(lock, link, program.as_fd(), kind, why.take()) {
                    // The driver cannot, and nobody asked for more than what fits.
                    Err(error) if self.args.hook == HookArg::Auto && kind == Kind::Xdp => {
                        why = Some(format!("{error:#}"));
                    }
                    attached => {
                        attached?;
                        break;
                    }
                }
            }
            let notes = lost_note(lost).into_iter().chain(before.note(&told));
            self.notes.extend(notes.map(|note| format!("{}: {note}", link.name)));
        }
        let first = loads.into_first().context("there is no interface to attach to")?;
        if let Some(rules) = rules.filter(|_| self.replaces_rules) {
            signals.go_on("loading the rules of the guard")?;
            self.set_rules(&first.maps, rules)?;
        }
        self.notes.extend(rules.and_then(|rules| rules.expired(" of the lists")));
        // Rules of the command line were not accepted without. All else is done: that this cannot be found out is no failure.
        self.keyless = first.maps.rings_without_key().unwrap_or_default();
        // Where that fails, it is still found by its number.
        running::confirm(self.instance, &first.maps).ok();
        Ok(())
    }

    fn set_rules(&mut self, maps: &GuardMaps, rules: &Rules) -> Result<()> {
        let changed = set_rules(self.instance, maps, rules, &self.args.source(), self.keys.as_deref())?;
        // Of one that is new nobody knew the slots.
        self.notes.extend(slots_note(&self.instance.name, changed).filter(|_| !self.is_new));
        Ok(())
    }

    /// What is known of the guard of this instance that is on the interface's way in.
    fn running(&self, link: &Link) -> Result<Vec<Loaded>> {
        let programs = loaded_programs(self.state)?;
        let ours =
            |loaded: &Loaded| loaded.instance.as_ref().is_none_or(|instance| *instance == self.instance.name);
        let at_xdp = attached_xdp(link.index, &programs)?.map(|ours| ours.loaded);
        let at_tc = attached(&mut Netlink::connect()?, link.index, Side::Ingress, &programs)?;
        Ok(at_xdp.into_iter().chain(at_tc.into_iter().map(|filter| filter.loaded)).filter(ours).collect())
    }

    /// Rules that mark are for all interfaces of the instance, of which none may be at XDP. Those that are attached to now
    /// will not be.
    fn expect_no_xdp_beside(&self, links: &[Link]) -> Result<()> {
        let programs = loaded_programs(self.state)?;
        let name = &self.instance.name;
        let is_ours = |loaded: &Loaded| {
            loaded.role == Role::GuardXdp && loaded.instance.as_deref() == Some(name.as_str())
        };
        let mut unseen: HashSet<u32> =
            programs.all().filter(|(_, loaded)| is_ours(loaded)).map(|(id, _)| id).collect();
        if unseen.is_empty() {
            return Ok(());
        }
        // Interfaces share a program, also one of these with one that stays.
        let here = Netns::current()?.inode();
        let mut stay = false;
        for netns in Netns::everywhere() {
            let found = netns.run(|| at_xdp(&programs)).unwrap_or_default();
            for (ifindex, ours) in found.into_iter().filter(|(_, ours)| is_ours(&ours.loaded)) {
                unseen.remove(&ours.program);
                stay |= netns.inode() != here || links.iter().all(|link| link.index != ifindex);
            }
        }
        if stay || !unseen.is_empty() {
            bail!("attaching the guard: instance '{name}' is on another interface at XDP: {NO_MARKS}");
        }
        Ok(())
    }

    /// Rules come before the program: it must not see a packet without them. Those that run are left to be replaced when all
    /// else has worked, so that nothing goes by rules of an attach that fails; but not if they mark, which at XDP they could
    /// not.
    fn prepare(&mut self, maps: &GuardMaps, rules: Option<&Rules>, has_lost: bool) -> Result<()> {
        self.renewal.as_mut().map_or(Ok(()), Renewal::carry_over)?;
        clock::publish(&maps.clock, None)?;
        let has_rules = maps.table()?.is_some();
        if !has_rules {
            self.restored = Some(Remembered(&self.instance.guard_dir).newest());
        }
        self.replaces_rules = rules.is_some() && has_rules && !maps.marks()?;
        if let Some(rules) = rules.filter(|_| !self.replaces_rules) {
            // What is not remembered any more cannot be put back, and is no reason to keep it.
            let before = (running::read(self.instance, maps).ok(), slots(&clock::published(&maps.clock)?));
            self.set_rules(maps, rules)?;
            self.before = Some(before);
            return Ok(());
        }
        self.keys.as_deref().map_or(Ok(()), |keys| rings::load(self.instance, &maps.keys, keys, []))?;
        if has_rules { Ok(()) } else { self.restore(maps, has_lost) }
    }

    /// Puts the rules that are remembered into use.
    fn restore(&mut self, maps: &GuardMaps, has_lost: bool) -> Result<()> {
        // What a program went by whose maps are gone is remembered as well.
        let may_be = !self.is_new || has_lost;
        let restored = if may_be { running::restore(self.instance, maps)? } else { None };
        let Some(rules) = restored else {
            let why = match self.renewal.as_ref().is_some_and(|renewal| renewal.lacks("guard_rules")) {
                true => "goes by rules of another version of netoken, of which nothing is remembered",
                false => "has no rules yet",
            };
            bail!(
                "attaching the guard: instance '{}' {why}; say which with --rules FILE",
                self.instance.name
            );
        };
        // The clock has gone with the other maps.
        if self.is_new { clock::publish(&maps.clock, rules.slots).map(drop) } else { Ok(()) }
    }

    /// What may be attached to an interface, the best first, and why that is not XDP where it could be.
    fn candidates(&self, link: &Link) -> Result<(Vec<Kind>, Option<&'static str>)> {
        let has_ethernet = guarded_header(link)? == LinkHeader::Ethernet;
        let tc = if has_ethernet { Kind::Tc } else { Kind::TcLayer3 };
        let may_be_passed_by = link.kind == "veth";
        Ok(match self.args.hook {
            HookArg::Tc => (vec![tc], None),
            HookArg::Xdp if !has_ethernet => bail!(
                "attaching the guard to {}: it has no Ethernet header, which XDP wants to see; use --hook tc",
                link.name
            ),
            HookArg::Xdp => (vec![Kind::Xdp], None),
            HookArg::Auto => {
                let programs = loaded_programs(self.state)?;
                let ours = |loaded: &Loaded| loaded.instance.as_deref() == Some(self.instance.name.as_str());
                let at_tc = attached(&mut Netlink::connect()?, link.index, Side::Ingress, &programs)?
                    .iter()
                    .any(|filter| ours(&filter.loaded));
                let at_xdp = attached_xdp(link.index, &programs)?.is_some_and(|there| ours(&there.loaded));
                let wants_tc = self.args.priority.is_some() || self.args.handle.is_some();
                match has_ethernet && !at_tc && !wants_tc {
                    true if may_be_passed_by && !at_xdp => (vec![tc], Some(PASSED_BY)),
                    true => (vec![Kind::Xdp, tc], None),
                    false => (vec![tc], None),
                }
            }
        })
    }

    /// Afterwards exactly one program of this instance is on the interface's way in. `why` it is not another one.
    fn attach_one(
        &mut self,
        lock: &Lock,
        link: &Link,
        program: BorrowedFd<'_>,
        kind: Kind,
        why: Option<String>,
    ) -> Result<()> {
        let name = &self.instance.name;
        let mut hooks = Hooks::open(self.state, Side::Ingress)?;
        if kind == Kind::Xdp {
            let allowed = Allowed { generic: self.args.hook == HookArg::Xdp, force: self.args.force };
            let own = program.try_clone_to_owned().context("keeping the program open")?;
            let done = attach_xdp(self.state, lock, link, name, program, allowed)?;
            let taken = hooks.take(lock, link, name);
            let (taken, refused) = match taken {
                Ok(taken) => (taken, Ok(())),
                Err(error) => (Taken::default(), Err(error)),
            };
            self.done.push((link.clone(), Done::Xdp(own, done, taken)));
            refused
        } else {
            let place = Place { priority: self.args.priority, handle: self.args.handle };
            let done = hooks.attach(lock, link, name, program, place)?;
            let (taken, refused) = match take_xdp(self.state, lock, link, name) {
                Ok(taken) => (taken, Ok(())),
                Err(error) => (None, Err(error)),
            };
            self.done.push((link.clone(), Done::Tc(done, why, taken)));
            refused
        }
    }

    /// Last things first.
    fn undo(&mut self, lock: &Lock) {
        self.undo_hooks(lock);
        if let Err(error) = self.put_back().context("putting back the rules that ran") {
            note!("netoken: {error:#}");
        }
        drop(self.renewal.take());
        if let Some(number) = self.restored {
            Remembered(&self.instance.guard_dir).forget_newer(number);
        }
    }

    /// The slots also where no rules ran: the stamp goes by them.
    fn put_back(&mut self) -> Result<()> {
        let Some((rules, slots)) = self.before.take() else { return Ok(()) };
        let maps = GuardMaps::open(&self.instance.pins)?;
        clock::publish(&maps.clock, slots)?;
        rules.map_or(Ok(()), |Running { rules, source, .. }| {
            running::load(self.instance, &maps, &rules, &source)
        })
    }

    fn undo_hooks(&mut self, lock: &Lock) {
        for (link, done) in std::mem::take(&mut self.done).iter().rev() {
            let undone = Hooks::open(self.state, Side::Ingress)
                .and_then(|mut hooks| self.undo_one(&mut hooks, lock, link, done));
            if let Err(error) = undone {
                note!("netoken: {error:#}");
            }
        }
    }

    /// Puts back what was at the other hook before it removes what is at this one: there is no moment without a guard.
    fn undo_one(&self, hooks: &mut Hooks<'_>, lock: &Lock, link: &Link, done: &Done) -> Result<()> {
        match done {
            Done::Xdp(program, done, taken) => {
                hooks.put_back(link, taken)?;
                undo_xdp(lock, link, program.as_fd(), done)
            }
            Done::Tc(done, _, taken) => {
                if let Some((mode, program)) = taken {
                    put_back_xdp(link, *mode, program.as_fd())?;
                }
                hooks.undo(lock, link, &self.instance.name, done)
            }
        }
    }

    fn tell(&self, scope: &Scope, out: &mut impl Write) -> Result<()> {
        for (link, done) in &self.done {
            let (mut filters_before, mut tcx_before) = (0, 0);
            let (hook, how, why, pushed_out) = match done {
                Done::Tc(done, why, taken) => {
                    let why = why.as_ref().map(|why| format!(" (not at XDP: {why})"));
                    (filters_before, tcx_before) = (done.before, done.tcx_before);
                    ("clsact ingress", (done.replaced(), taken.is_some()), why, None)
                }
                Done::Xdp(_, done, taken) => {
                    let why = done.why_generic.as_ref();
                    let why = why.map(|why| format!(" (natively the driver refused: {why})"));
                    let how = (done.replaced(), !taken.is_empty());
                    (hook_name(done.mode), how, why, done.pushed_out.as_ref())
                }
            };
            let (replaced, moved) = how;
            if scope.json {
                let attached = Record::GuardAttached {
                    interface: &link.name,
                    hook,
                    replaced,
                    pushed_out,
                    rings_without_key: &self.keyless,
                };
                out.write_all(format!("{}\n", serde_json::to_string(&attached)?).as_bytes())?;
                continue;
            }
            if let Some(foreign) = pushed_out {
                note!("pushed out of XDP of {}: {foreign}; it does not come back by itself", link.name);
            }
            let how = match (replaced, moved) {
                (true, _) => "replaced in place on",
                (false, true) => "moved on",
                (false, false) => "attached to",
            };
            note!("guard {how} {}: {hook}{}", link.name, why.unwrap_or_default());
            if let Some(remark) = tcx::remark(tcx_before, RISK, TO_THE_FRONT) {
                note!("{}: {remark}", link.name);
            }
            if let Some(remark) = filters_remark(filters_before, RISK) {
                note!("{}: {remark}", link.name);
            }
            if matches!(done, Done::Xdp(..)) && link.kind == "veth" {
                note!("{}: {PASSED_BY}; {SEES_IT}", link.name);
            }
        }
        self.notes.iter().for_each(|note| note!("{note}"));
        for ring in &self.keyless {
            note!("{}", keyless_note(&self.instance.name, *ring));
        }
        Ok(())
    }
}
