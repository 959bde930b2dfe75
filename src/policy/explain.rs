//! Says in words why a rule does not match a SYN. What the kernel decides is asked elsewhere ([`super::ask`]); this only
//! explains it to a person.

use super::ask::Syn;
use super::values::Range;
use super::{Condition, Rule, Values};

/// The first condition of a rule that does not hold; nothing if all do.
pub fn fails<'a>(rule: &'a Rule, syn: &Syn) -> Option<&'a Condition> {
    rule.conditions.iter().find(|condition| !holds(condition, syn))
}

fn holds(condition: &Condition, syn: &Syn) -> bool {
    let one_of = |list: &[Range], number: u32| list.iter().any(|r| (r.first..=r.last).contains(&number));
    let sender = syn.sender.as_ref();
    let fits = match &condition.values {
        Values::Interface(list) => {
            list.all().iter().any(|i| i.index != 0 && (i.netns, i.index) == syn.interface)
        }
        Values::Src(list) => list.all().iter().any(|prefix| prefix.contains(syn.src)),
        Values::Dst(list) => list.all().iter().any(|prefix| prefix.contains(syn.dst)),
        Values::SrcPort(list) => one_of(list.all(), syn.src_port.into()),
        Values::Port(list) => one_of(list.all(), syn.port.into()),
        Values::Mark(list) => list.all().iter().any(|mark| syn.mark & mark.mask == mark.value),
        Values::Uid(list) => match sender {
            Some(sender) => one_of(list.all(), sender.uid),
            None => return false,
        },
        Values::Cgroup(list) => match sender {
            Some(sender) => list.all().iter().any(|cgroup| {
                cgroup.id != 0 && sender.cgroups.get(usize::from(cgroup.level)) == Some(&cgroup.id)
            }),
            None => return false,
        },
    };
    fits != condition.negated
}
