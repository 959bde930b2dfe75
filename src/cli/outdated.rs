//! Programs that another version of netoken has attached: what they go by, no command of this one changes.

use anyhow::Result;

use crate::hooks::loaded::{Role, loaded_programs};
use crate::state::State;

/// Says if something that was changed does not reach every program of an instance: of its guard, or else of its stamp.
pub(super) fn tell(state: &State, instance: &str, of_guard: bool) -> Result<()> {
    let programs = loaded_programs(state)?;
    let outdated = programs.all().filter(|(_, program)| {
        let is_meant = program.instance.as_deref() == Some(instance) && program.is_outdated;
        is_meant && (program.role != Role::Stamp) == of_guard
    });
    let (count, guard) = (outdated.count(), if of_guard { "guard " } else { "" });
    if count > 0 {
        note!(
            "netoken: of another version of netoken, and not changed: {count} {}; to see where: netoken {guard}--query",
            if count == 1 { "program" } else { "programs" }
        );
    }
    Ok(())
}
