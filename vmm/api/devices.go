package api

import (
	"net/http"
	"time"

	"github.com/govmm/govmm/balloon"
)

// Devices describes the virtio devices of a VM.
type Devices struct {
	Balloon *Balloon `json:"balloon,omitempty"` // nil: none
	RNG     bool     `json:"rng"`
	Console bool     `json:"console"`
	Disks   []Disk   `json:"disks"`
	Nets    []Net    `json:"nets"`
	Vsock   *Vsock   `json:"vsock,omitempty"` // nil: none
}

// Vsock describes the socket device.
type Vsock struct {
	CID  uint64 `json:"cid"`  // of the guest
	Path string `json:"path"` // of the host's socket
}

// Balloon describes a memory balloon, in bytes.
type Balloon struct {
	// Target is how much of the guest's memory the balloon shall hold, Actual
	// how much it holds by the guest's word.
	Target uint64 `json:"target"`
	Actual uint64 `json:"actual"`
	// Stats are what the guest's driver said last; nil: nothing yet.
	Stats *balloon.Stats `json:"stats,omitempty"`
}

// Disk describes a disk. The counters are of this process.
type Disk struct {
	Path         string `json:"path"`
	Size         uint64 `json:"size"` // bytes
	ReadOnly     bool   `json:"readonly"`
	Direct       bool   `json:"direct"`
	ID           string `json:"id,omitempty"`
	Queues       int    `json:"queues"`
	ReadBytes    uint64 `json:"read_bytes"`
	WrittenBytes uint64 `json:"written_bytes"`
	Errors       uint64 `json:"errors"` // of the host's storage
}

// Net describes a network device. The counters are of this process, in frames
// and bytes, received and sent by the guest.
type Net struct {
	MAC       string `json:"mac"`
	Tap       string `json:"tap"`
	Bridge    string `json:"bridge,omitempty"` // if govmm made the tap its port
	MTU       uint16 `json:"mtu,omitempty"`    // 0: the tap's own
	Queues    int    `json:"queues"`           // pairs
	RxFrames  uint64 `json:"rx_frames"`
	RxBytes   uint64 `json:"rx_bytes"`
	RxDropped uint64 `json:"rx_dropped"`
	TxFrames  uint64 `json:"tx_frames"`
	TxBytes   uint64 `json:"tx_bytes"`
	TxDropped uint64 `json:"tx_dropped"`
}

// BalloonRequest is the body of PUT /v1/balloon.
type BalloonRequest struct {
	Target *uint64 `json:"target"` // bytes that the balloon shall hold
}

// PowerButtonRequest is the body of POST /v1/power-button.
type PowerButtonRequest struct {
	// Wait is how long the answer waits for the guest to power off; 0: not at
	// all.
	Wait Duration `json:"wait,omitempty"`
}

// maxWait bounds how long a press of the power button is waited for.
const maxWait = 24 * time.Hour

func (s *Server) getBalloon(w http.ResponseWriter, r *http.Request) error {
	b, err := s.vm.Balloon(r.Context())
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, b)
}

func (s *Server) putBalloon(w http.ResponseWriter, r *http.Request) error {
	var req BalloonRequest
	if err := body(w, r, &req); err != nil {
		return err
	}
	if req.Target == nil {
		return &kindError{ErrInvalid, "body: a target in bytes is wanted, as in {\"target\":67108864}"}
	}
	if err := s.vm.SetBalloon(*req.Target); err != nil {
		return err
	}
	return s.getBalloon(w, r)
}

// postPowerButton answers when the machine has ended, the time is up or the
// client has left.
func (s *Server) postPowerButton(w http.ResponseWriter, r *http.Request) error {
	var req PowerButtonRequest
	if err := body(w, r, &req); err != nil {
		return err
	}
	if time.Duration(req.Wait) > maxWait {
		return &kindError{ErrInvalid, "wait: a day at most"}
	}
	if err := s.vm.PowerOff(); err != nil {
		return err
	}
	if req.Wait != 0 {
		limit := time.NewTimer(time.Duration(req.Wait))
		defer limit.Stop()
		select {
		case <-s.vm.Ended():
		case <-limit.C:
		case <-r.Context().Done():
		}
	}
	return writeJSON(w, http.StatusOK, s.vm.Info())
}
