//! A laboratory: network namespaces, veth pairs and a state directory of its own for one case. Everything is
//! gone when it is dropped. `scripts/test` removes what a killed run left behind, by NETOKEN_TEST_ID.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{Flock, FlockArg};

/// The program under test, as cargo built it.
pub const NETOKEN: &str = env!("CARGO_BIN_EXE_netoken");

/// Names another one, which is optimised like the release, for what is measured.
const RELEASE: &str = "NETOKEN_TEST_RELEASE";

/// How long something that must happen may take.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A rule for a guard that looks at everything and lets everything pass.
#[allow(dead_code)]
pub const OBSERVE: &str =
    "[[rule]]\nname = 'all'\ndst = ['0.0.0.0/0', '::/0']\nmode = 'observe'\ntokens = '0000000000000001'\n";

const LOOPBACK_UP: &str = "link set lo up";

/// One case's own small world.
pub struct Lab {
    prefix: String,
    /// What NETOKEN_RUN names in it.
    pub run: PathBuf,
    namespaces: Vec<String>,
}

impl Lab {
    /// An empty one.
    pub fn new() -> Result<Lab> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let id = env::var("NETOKEN_TEST_ID").unwrap_or_else(|_| "nt".to_string());
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("{id}-{}-{number}", std::process::id());
        let dir = env::var_os("NETOKEN_TEST_DIR").map_or_else(env::temp_dir, PathBuf::from);
        let run = dir.join(&prefix);
        fs::create_dir_all(&run)?;
        Ok(Lab { prefix, run, namespaces: Vec::new() })
    }

    /// Makes a network namespace with loopback up, and returns the name by which it is known.
    pub fn netns(&mut self, role: &str) -> Result<String> {
        let [name] = self.add_netns([role])?;
        ip(&name, [LOOPBACK_UP.to_string()])?;
        Ok(name)
    }

    /// Makes network namespaces in which nothing is up yet.
    pub fn add_netns<const N: usize>(&mut self, roles: [&str; N]) -> Result<[String; N]> {
        let names = roles.map(|role| format!("{}-{role}", self.prefix));
        self.namespaces.extend(names.iter().cloned());
        ip("", names.iter().map(|name| format!("netns add {name}")))?;
        names.iter().try_for_each(|name| self.trust_addresses(name))?;
        Ok(names)
    }

    /// Turns duplicate address detection off for what will be made in a namespace. Until it is done, which takes up to
    /// two seconds, a router has no link-local address to ask for its neighbours from, and after three it gives up.
    fn trust_addresses(&self, ns: &str) -> Result<()> {
        self.within(ns, || {
            for scope in ["all", "default"] {
                let setting = format!("/proc/sys/net/ipv6/conf/{scope}/accept_dad");
                fs::write(&setting, "0").with_context(|| format!("setting {setting}"))?;
            }
            Ok(())
        })
    }

    /// Joins two namespaces by a veth pair, up, with TX checksum offload on or off at both ends.
    #[allow(dead_code)]
    pub fn veth(&self, one: (&str, &str), other: (&str, &str), tx_offload: bool) -> Result<()> {
        self.add_veth(one, other, tx_offload)?;
        [one, other].into_iter().try_for_each(|(ns, iface)| ip(ns, [format!("link set {iface} up")]))
    }

    /// The same, but not up yet.
    pub fn add_veth(&self, one: (&str, &str), other: (&str, &str), tx_offload: bool) -> Result<()> {
        let ((ns1, if1), (ns2, if2)) = (one, other);
        ip("", [format!("link add {if1} netns {ns1} type veth peer name {if2} netns {ns2}")])?;
        // A veth is born with it.
        if !tx_offload {
            for (ns, iface) in [one, other] {
                self.ethtool(ns, &format!("-K {iface} tx off"))?;
            }
        }
        Ok(())
    }

    /// Runs ethtool in a namespace.
    pub fn ethtool(&self, ns: &str, args: &str) -> Result<()> {
        let mut command = Command::new("ethtool");
        let output = self.within(ns, || Ok(command.args(args.split_whitespace()).output()?))?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "ethtool {args} in {ns}: {}: {said}", output.status);
        Ok(())
    }

    /// Brings an interface and loopback up, and gives the interface addresses, usable at once.
    pub fn up_with(&self, ns: &str, iface: &str, addrs: &[String]) -> Result<()> {
        let up = [LOOPBACK_UP.to_string(), format!("link set {iface} up")];
        ip(ns, up.into_iter().chain(addrs.iter().map(|addr| add_addr(iface, addr))))
    }

    /// Gives an interface an address, usable at once.
    pub fn addr(&self, ns: &str, iface: &str, addr: &str) -> Result<()> {
        ip(ns, [add_addr(iface, addr)])
    }

    /// Gives an interface another name. Before 6.2 it has to be down meanwhile.
    #[allow(dead_code)]
    pub fn rename(&self, ns: &str, from: &str, to: &str) -> Result<()> {
        let commands = [
            format!("link set {from} down"),
            format!("link set {from} name {to}"),
            format!("link set {to} up"),
        ];
        let live = netoken::kernel::Kernel::probe().version() >= Some((6, 2));
        ip(ns, if live { commands[1..2].to_vec() } else { commands.to_vec() })
    }

    /// The program under test with these arguments, not started yet. Its state is the laboratory's.
    pub fn netoken(&self, args: &str) -> Command {
        let mut command = Command::new(env::var_os(RELEASE).unwrap_or_else(|| NETOKEN.into()));
        command.args(args.split_whitespace()).stdin(Stdio::null());
        command.env("NETOKEN_RUN", &self.run).env("NETOKEN_KEYS", self.keys());
        command
    }

    /// Whether the program under test is optimised like the release.
    #[allow(dead_code)]
    pub fn is_optimised() -> bool {
        !cfg!(debug_assertions) || env::var_os(RELEASE).is_some()
    }

    /// What NETOKEN_KEYS names in it. Beside the state directory, which netoken removes when it is empty.
    pub fn keys(&self) -> PathBuf {
        self.run.with_extension("keys")
    }

    fn files(&self) -> PathBuf {
        self.run.with_extension("files")
    }

    /// Writes a file, in place of the one that has this name, and returns its path.
    #[allow(dead_code)]
    pub fn file(&self, name: &str, text: impl AsRef<[u8]>) -> Result<PathBuf> {
        fs::create_dir_all(self.files())?;
        let path = self.files().join(name);
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
        Ok(path)
    }

    /// Runs the program under test and returns what it printed, successful or not.
    pub fn run(&self, args: &str) -> Result<Output> {
        self.netoken(args).output().with_context(|| format!("running netoken {args}"))
    }

    /// Runs the program under test and returns its standard output; it has to succeed.
    pub fn ok(&self, args: &str) -> Result<String> {
        let output = self.run(args)?;
        if !output.status.success() {
            bail!("netoken {args}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Holds the lock of the state, as a command does that changes something.
    #[allow(dead_code)]
    pub fn hold_lock(&self) -> Result<Flock<File>> {
        let file = File::open(self.run.join("lock"))?;
        Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| errno).context("locking the state")
    }

    /// Does something in a namespace, on a thread of its own. Sockets made there stay there.
    pub fn within<T: Send>(&self, ns: &str, f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let netns = netoken::netns::Netns::open(ns)?;
        thread::scope(|scope| {
            let work = scope.spawn(move || {
                netns.enter()?;
                f()
            });
            work.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // A case may have removed one of them.
        let left = self.namespaces.iter().filter(|name| Path::new("/run/netns").join(name).exists());
        ip("", left.map(|name| format!("netns del {name}"))).ok();
        // As often as it was mounted.
        while nix::mount::umount(&self.run.join("bpf")).is_ok() {}
        fs::remove_dir_all(&self.run).ok();
        fs::remove_dir_all(self.keys()).ok();
        fs::remove_dir_all(self.files()).ok();
    }
}

/// A process of ours that is ended with the case, and whose output can be waited for.
pub struct Running {
    /// The process.
    pub child: Child,
    lines: Receiver<String>,
    /// Every line seen so far.
    pub seen: Vec<String>,
}

impl Running {
    /// Starts it. Standard output and standard error are read as one.
    pub fn start(command: &mut Command) -> Result<Running> {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let (sender, lines) = channel();
        let err_sender = sender.clone();
        let (out, err) = (child.stdout.take().context("stdout")?, child.stderr.take().context("stderr")?);
        thread::spawn(move || {
            BufReader::new(out).lines().map_while(Result::ok).for_each(|l| drop(sender.send(l)))
        });
        thread::spawn(move || {
            BufReader::new(err).lines().map_while(Result::ok).for_each(|l| drop(err_sender.send(l)))
        });
        Ok(Running { child, lines, seen: Vec::new() })
    }

    /// Waits for a line that fits, among those not yet waited for.
    pub fn wait_for(&mut self, what: &str, fits: impl Fn(&str) -> bool) -> Result<String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    self.seen.push(line.clone());
                    if fits(&line) {
                        return Ok(line);
                    }
                }
                Err(error) => bail!("waiting for {what}: {error}; seen so far:\n{}", self.seen.join("\n")),
            }
        }
    }

    /// The first line that fits and comes within that time, if one does.
    #[allow(dead_code)]
    pub fn wait_within(&mut self, time: Duration, fits: impl Fn(&str) -> bool) -> Option<String> {
        let deadline = Instant::now() + time;
        loop {
            let line = self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())).ok()?;
            self.seen.push(line.clone());
            if fits(&line) {
                return Some(line);
            }
        }
    }

    /// Sends a signal.
    pub fn signal(&self, signal: nix::sys::signal::Signal) -> Result<()> {
        Ok(nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.child.id().cast_signed()), signal)?)
    }

    /// Stops it until it gets SIGCONT, and comes back when it has stopped.
    #[allow(dead_code)]
    pub fn pause(&self) -> Result<()> {
        self.signal(nix::sys::signal::Signal::SIGSTOP)?;
        let status = format!("/proc/{}/stat", self.child.id());
        wait_until("the process to stop", || Ok(fs::read_to_string(&status)?.contains(") T ").then_some(())))
    }

    /// Waits for its end, and returns its exit code and all that it printed.
    pub fn end(mut self) -> Result<(Option<i32>, Vec<String>)> {
        let status = wait_until("the process to end", || Ok(self.child.try_wait()?))?;
        // The pipes are closed with it, and nothing but the readers stands between.
        loop {
            match self.lines.recv_timeout(PATIENCE) {
                Ok(line) => self.seen.push(line),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => bail!("somebody else holds its output open"),
            }
        }
        Ok((status.code(), std::mem::take(&mut self.seen)))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Asks again and again until there is an answer, but not for ever.
pub fn wait_until<T>(what: &str, mut ask: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask()? {
            return Ok(answer);
        }
        if Instant::now() >= deadline {
            bail!("waited {PATIENCE:?} for {what}");
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Runs `ip` once for all these commands, in a namespace, or without a name where the caller is. The first that
/// fails is the last.
pub fn ip(ns: &str, commands: impl IntoIterator<Item = String>) -> Result<()> {
    let commands: Vec<String> = commands.into_iter().collect();
    let mut command = Command::new("ip");
    if !ns.is_empty() {
        command.args(["-n", ns]);
    }
    command.args(["-batch", "-"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().context("starting ip")?;
    child.stdin.take().context("stdin")?.write_all((commands.join("\n") + "\n").as_bytes())?;
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip in '{ns}': {said}in {commands:#?}");
    Ok(())
}

fn add_addr(iface: &str, addr: &str) -> String {
    let nodad = if addr.contains(':') { "nodad" } else { "" };
    format!("addr add {addr} dev {iface} {nodad}")
}

/// A counter of a namespace's kernel, as nstat calls it: TcpInCsumErrors, IpInHdrErrors, TcpRetransSegs.
pub fn kernel_counter(ns: &str, name: &str) -> Result<u64> {
    let read = || -> Result<Option<u64>> {
        // Of the thread: the process is elsewhere.
        let read = |file: &str| fs::read_to_string(format!("/proc/thread-self/net/{file}"));
        Ok(in_pairs(&read("snmp")?, name)
            .or(in_pairs(&read("netstat")?, name))
            .or(in_lines(&read("snmp6")?, name)))
    };
    let netns = netoken::netns::Netns::open(ns)?;
    let found = thread::scope(|scope| {
        let work = scope.spawn(|| netns.enter().and_then(|()| read()));
        work.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })?;
    found.with_context(|| format!("the kernel has no counter {name}"))
}

/// Of two lines that begin alike the first names what the second counts.
fn in_pairs(text: &str, name: &str) -> Option<u64> {
    let lines: Vec<&str> = text.lines().collect();
    lines.chunks(2).find_map(|pair| {
        let (prefix, names) = pair.first()?.split_once(": ")?;
        let (_, values) = pair.get(1)?.split_once(": ")?;
        let wanted = name.strip_prefix(prefix)?;
        let at = names.split_whitespace().position(|found| found == wanted)?;
        values.split_whitespace().nth(at)?.parse().ok()
    })
}

fn in_lines(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
}

/// An address and port as one writes them in a URL.
pub fn host(addr: IpAddr, port: u16) -> String {
    std::net::SocketAddr::new(addr, port).to_string()
}

/// How many SYNs may be sent again in a case that does not want it.
const STALLS_MAX: u64 = 2;

/// Fails unless so many SYNs were counted; exactly, but for some that the TCP of this namespace has sent again, because a
/// machine that had much to do let an answer wait for a second. More than some is no such machine.
#[allow(dead_code)]
pub fn expect_count(ns: &str, found: u64, wanted: u64, what: &str) -> Result<()> {
    let again = kernel_counter(ns, "TcpExtTCPSynRetrans")?.min(STALLS_MAX);
    ensure!(
        (wanted..=wanted + again).contains(&found),
        "{what}: {found} counted, not {wanted}, with {again} SYNs sent again"
    );
    Ok(())
}
