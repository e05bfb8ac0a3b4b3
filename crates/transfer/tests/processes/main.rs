//! The transfer engine between real processes: killed, stopped, restarted, cut off, lying.
//!
//! The peers are this very binary, started again ([`peer`]) and driven over their standard input and output ([`process`]);
//! they die with the test that started them. What holds for every transport stands in [`laws`] and runs against each; what
//! is about the wire stands in [`resets`] (connections that break) and [`networks`] (packets that get lost).

#![cfg(target_os = "linux")]
#![expect(unsafe_code, reason = "looks at memory behind the engine's back")]
#![expect(clippy::unwrap_used, reason = "an error here is a failed test")]

mod churn;
mod laws;
mod lies;
mod networks;
mod peer;
mod process;
mod resets;
#[path = "../transfer/support.rs"]
#[expect(dead_code, reason = "shared with the suite that stays in one process, which uses all of it")]
mod support;

/// What the shared support asks before it makes an engine.
mod tls {
    /// No encryption: who dies, stops or lies here does so below it.
    pub fn wanted() -> Option<kvasir_transfer::TlsConfig> {
        None
    }
}

macro_rules! on {
    ($transport:ident, $kind:ident) => {
        mod $transport {
            use kvasir_types::TransportKind::$kind;

            #[test]
            fn a_target_killed_in_mid_read_is_an_error_and_its_next_life_is_found() {
                crate::laws::killed_target(kvasir_transfer::Op::Read, $kind);
            }
            #[test]
            fn a_target_killed_in_mid_write_is_an_error_and_its_next_life_is_found() {
                crate::laws::killed_target(kvasir_transfer::Op::Write, $kind);
            }
            #[test]
            fn a_stopped_target_costs_the_deadline_and_touches_nothing_when_it_goes_on() {
                crate::laws::stopped_target($kind);
            }
            #[test]
            fn memory_unregistered_while_another_process_writes_is_its_owners_alone() {
                crate::laws::unregistered_under_a_writer($kind);
            }
            #[test]
            fn a_writer_stopped_in_mid_write_is_fenced_off_and_nothing_lands_when_it_goes_on() {
                crate::laws::stopped_writer($kind);
            }
            #[test]
            fn of_five_processes_the_dead_one_is_named_and_the_others_are_served() {
                crate::laws::one_of_five_dead($kind);
            }
            #[test]
            fn a_killed_writer_frees_its_grant_and_its_place() {
                crate::laws::killed_writer($kind);
            }
            #[test]
            fn a_thousand_segments_opened_and_closed_leave_nothing_behind() {
                crate::churn::a_thousand_lives($kind);
            }
        }
    };
}

// Every transport between processes: one line each.
on!(tcp, Tcp);
on!(shm, Shm);
on!(ucx, Ucx);
