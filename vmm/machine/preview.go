package machine

import (
	"fmt"

	"github.com/govmm/govmm/internal/kind"
	"github.com/govmm/govmm/internal/strictcbor"
	"github.com/govmm/govmm/kvm"
	"github.com/govmm/govmm/vmm/cpu"
)

// statePreview is what of a [machineState] is known before the guest stops, and what a
// destination may be unable to load. A host ignores fields and MSRs that it does not know.
type statePreview struct {
	MSRs []kvm.MSR `cbor:"msrs"` // of each vCPU, those that describe the processor
}

// PreviewState implements [migrate.Previewer].
func (s *source) PreviewState() ([]byte, error) {
	b, err := strictcbor.Marshal(statePreview{MSRs: s.kernel.features})
	if err != nil {
		return nil, fmt.Errorf("encode what is known of the machine's state: %w", err)
	}
	return b, nil
}

// CheckPreview implements [migrate.PreviewChecker]. All vCPUs are alike.
func (t *Target) CheckPreview(preview []byte) error {
	p, err := decodePreview(preview)
	if err != nil {
		return kind.Told(err)
	}
	return kind.Told(cpu.CheckFeatureMSRs(t.vcpus[0].kvm, t.spec.CPUID, p.MSRs))
}

// decodePreview decodes what an untrusted peer may have sent.
func decodePreview(b []byte) (p statePreview, err error) {
	if err := strictcbor.UnmarshalKnown(b, &p); err != nil {
		return p, fmt.Errorf("decode what is known of the machine's state: %w", err)
	}
	return p, nil
}
