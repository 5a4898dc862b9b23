package migrate

import (
	"fmt"
	"time"

	"github.com/govmm/govmm/internal/strictcbor"
)

// The CBOR messages. Unknown fields are ignored, so that fields can be added.
type (
	helloOK struct {
		Version  uint16 `cbor:"version"`
		Channels uint16 `cbor:"channels"` // data connections
		Alive    uint16 `cbor:"alive"`    // milliseconds from one ALIVE of the source to the next; 0: the default
		// Features are those that the destination knows.
		Features []string `cbor:"features,omitempty"`
	}
	// configMsg is the payload of CONFIG.
	configMsg struct {
		Features []string `cbor:"features"` // of the protocol, those that this migration uses
		Machine  []byte   `cbor:"machine"`  // in the VMM's encoding
		// Preview is that of a [Previewer]. A destination that does not know it finds out when it loads the state.
		Preview []byte `cbor:"preview,omitempty"`
	}
	refused struct {
		Reasons []string `cbor:"reasons"`
	}
	reason struct {
		Reason string `cbor:"reason"`
	}
	// tookMsg is the payload of PREPARED and RUNNING: how long loading the state,
	// or starting the guest, took, and how long comparing the storage took when the
	// pages had landed.
	tookMsg struct {
		Microseconds uint64 `cbor:"us"`
		Storage      uint64 `cbor:"storage_us,omitempty"`
	}
	verdictMsg struct {
		Verdict string `cbor:"verdict"`
	}
)

// Verdicts of a destination on a session.
const (
	verdictUnknown = "unknown" // it does not know the session: the guest may run or not
	verdictRunning = "running"
	verdictAborted = "aborted"
	verdictPending = "pending" // it is being decided: the guest is being started
)

func decodeControl(t frameType, b []byte, v any) error {
	if err := strictcbor.UnmarshalKnown(b, v); err != nil {
		return fmt.Errorf("%w: %v: %v", ErrProtocol, t, err)
	}
	return nil
}

// decodeTook returns what a PREPARED or RUNNING says.
func decodeTook(r reply) (took, storage time.Duration, err error) {
	var m tookMsg
	err = decodeControl(r.typ, r.payload, &m)
	microseconds := func(n uint64) time.Duration {
		return time.Duration(min(n, uint64(forever/time.Microsecond))) * time.Microsecond
	}
	return microseconds(m.Microseconds), microseconds(m.Storage), err
}

// clip bounds text for or from the peer and removes control characters: it ends up
// in one line of a terminal.
func clip(s string) string {
	out := make([]rune, 0, min(len(s), maxReason))
	for _, r := range s {
		if len(out) == maxReason {
			return string(out) + "…"
		}
		if r < ' ' || r == 0x7f || (r >= 0x80 && r < 0xa0) {
			r = ' '
		}
		out = append(out, r)
	}
	return string(out)
}

// refusal turns a peer's list back into one error, which matches [ErrRefused].
func refusal(reasons []string) error {
	if len(reasons) == 0 {
		return fmt.Errorf("%w without a reason", ErrRefused)
	}
	list := make([]string, 0, len(reasons))
	for _, r := range reasons[:min(len(reasons), maxReasons)] {
		list = append(list, clip(r))
	}
	return &RefusedError{list}
}
